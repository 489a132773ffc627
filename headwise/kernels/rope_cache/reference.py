"""Rotate, normalize and cache in plain torch: the specification of the kernel."""

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
    """Do what MLA does between its projections and its attention: rotary embedding, latent norm, cache write.

    Args:
        q_rope: (tokens, heads, qk_rope_head_dim), not yet rotated.
        compressed: (tokens, kv_lora_rank + qk_rope_head_dim), [latent ; rotary key] as projected.
        norm_weight: (kv_lora_rank), of the RMSNorm on the latent.
        positions: (tokens) integers; plane i is rotated by `positions * frequencies[i]` radians.
        frequencies: (qk_rope_head_dim / 2), float32.
        latent_cache: (blocks, block_size, kv_lora_rank), written in place: the pages of a paged cache, or
            (batch, capacity, kv_lora_rank).
        k_rope_cache: as `latent_cache`, qk_rope_head_dim numbers.
        slots: (tokens) int64, the row `block * block_size + offset` of each token; negative: not cached.
        eps: epsilon of the RMSNorm.
        interleaved: whether plane i has the numbers 2i and 2i + 1 (DeepSeek), or i and i + qk_rope_head_dim / 2.
            The result has the second order in both cases, as in transformers.
        attention_scaling: factor on cosine and sine (YaRN).

    Returns:
        The rotated queries, with the shape and type of `q_rope`.
    """
    rank = norm_weight.shape[0]
    latent = compressed[:, :rank].float()
    latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + eps)
    latent = norm_weight * latent.to(compressed.dtype)
    angle = positions[:, None].float() * frequencies
    cos, sin = angle.cos() * attention_scaling, angle.sin() * attention_scaling

    def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows = rows.float()
        real, imaginary = (rows[..., 0::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(q_rope.dtype)

    cached = slots >= 0
    block, offset = slots[cached] // latent_cache.shape[1], slots[cached] % latent_cache.shape[1]
    latent_cache[block, offset] = latent[cached].to(latent_cache.dtype)
    k_rope_cache[block, offset] = rotate(compressed[:, rank:], cos, sin)[cached]
    return rotate(q_rope, cos[:, None], sin[:, None])
