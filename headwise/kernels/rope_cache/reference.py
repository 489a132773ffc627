"""Rotate, normalise and cache in plain torch: the specification of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cache(
    q_rope: Tensor,
    compressed: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    latent_cache: Tensor,
    k_rope_cache: Tensor,
    slots: Tensor,
    *,
    eps: float,
    interleaved: bool = False,
    attention_scaling: float = 1.0,
) -> Tensor:
    """What MLA does between its projections and its attention: rotary embedding, latent norm, cache write.

    Args:
        q_rope: (tokens, heads, qk_rope_head_dim), not yet rotated.
        compressed: (tokens, kv_lora_rank + qk_rope_head_dim), [latent ; rotary key] as projected.
        norm_weight: (kv_lora_rank), of the RMSNorm on the latent; `eps` its epsilon.
        positions: (tokens) integers; plane i turns by `positions * frequencies[i]` radians.
        frequencies: (qk_rope_head_dim / 2), float32.
        latent_cache, k_rope_cache: (blocks, block size, kv_lora_rank or qk_rope_head_dim), written in place: the
            pages of a paged cache, or (batch, capacity, ...).
        slots: (tokens) int64, the row `block * block size + offset` of each token; negative: not cached.
        interleaved: plane i is the numbers 2i and 2i + 1 (DeepSeek), not i and i + qk_rope_head_dim / 2. The
            result is half-split either way, as in transformers.
        attention_scaling: factor on cosine and sine (YaRN).

    Returns:
        The rotated queries, shaped and typed like `q_rope`.
    """
    rank = norm_weight.shape[0]
    latent = compressed[:, :rank].float()
    latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + eps)
    latent = norm_weight * latent.to(compressed.dtype)
    angle = positions[:, None].float() * frequencies
    cos, sin = angle.cos() * attention_scaling, angle.sin() * attention_scaling

    def turn(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows = rows.float()
        real, imaginary = (rows[..., 0::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(q_rope.dtype)

    kept = slots >= 0
    block, offset = slots[kept] // latent_cache.shape[1], slots[kept] % latent_cache.shape[1]
    latent_cache[block, offset] = latent[kept].to(latent_cache.dtype)
    k_rope_cache[block, offset] = turn(compressed[:, rank:], cos, sin)[kept]
    return turn(q_rope, cos[:, None], sin[:, None])
