"""Absorbed MLA decode in plain torch: the specification of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels.decode.latent_fp8 import dequantize_latent
from headwise.kernels.gqa_decode import reference


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    *,
    scale: float,
    latent_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend on the latent cache, with `k_up` absorbed in the query and `v_up` in `o` (DeepSeek-V2, section 2.1.2).

    All heads read one group of keys [latent ; k_rope], whose value is the latent.

    Args:
        q_latent: (batch, S, heads, kv_lora_rank), the query without its rotary part, times `k_up`.
        q_rope: (batch, S, heads, qk_rope_head_dim), rotated.
        latent: (batch, capacity, kv_lora_rank), after the latent norm; with a block table (pages, page_size, ...).
        k_rope: as `latent`, (..., qk_rope_head_dim), rotated. Both may be views of one buffer.
        scale: of the scores. It has no default: the head dim does not follow from these shapes.
        latent_scale: as `latent`, (..., blocks of 128) float32: the latent is e4m3 times its block's scale.
        lengths: (batch) int32, tokens in the cache; None: capacity.
        starts: (batch) int32, first visible token (left padding); None: 0.
        block_table: (batch, max_pages) int32, the page of each run of page_size tokens.
        window: sliding window in tokens, the token itself counted.
        indices: (batch, S, count) int32, in place of a block table: the tokens of the cache that each query token
            attends to, visible ones first, as a top-k over scores puts them. A query token with fewer visible
            tokens than `count` attends to as many of the first as it has; None: all visible tokens.

    Returns:
        The weighted latents (batch, S, heads, kv_lora_rank), to be multiplied by `v_up`, and the log-sum-exp.
    """
    if latent_scale is not None:
        latent = dequantize_latent(latent, latent_scale)
    if indices is not None:
        batch, tokens, count = indices.shape
        if lengths is None:
            lengths = torch.full((batch,), latent.shape[1], device=latent.device)
        visible = lengths if starts is None else lengths - starts
        own = (visible[:, None] - tokens + 1 + torch.arange(tokens, device=visible.device)).clamp(0, count)
        sequence = torch.arange(batch, device=indices.device)[:, None, None]
        keys = (each[sequence, indices.long()].flatten(0, 1) for each in (latent, k_rope))
        queries = (each.flatten(0, 1)[:, None] for each in (q_latent, q_rope))
        out, lse = mla_decode(*queries, *keys, scale=scale, lengths=own.flatten())
        return out.unflatten(0, (batch, tokens)).squeeze(2), lse.unflatten(0, (batch, tokens)).squeeze(2)
    return reference.gqa_decode(
        torch.cat([q_latent, q_rope], -1),
        torch.cat([latent, k_rope], -1)[..., None, :],
        latent[..., None, :],
        scale=scale,
        lengths=lengths,
        starts=starts,
        block_table=block_table,
        window=window,
    )
