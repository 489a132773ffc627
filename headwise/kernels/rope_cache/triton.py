"""Rotate, normalise and cache in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(real, imaginary, cos, sin, Out, column, half, live):
    tl.store(Out + column, (real * cos - imaginary * sin).to(Out.dtype.element_ty), mask=live)
    tl.store(Out + half + column, (imaginary * cos + real * sin).to(Out.dtype.element_ty), mask=live)


@triton.jit
def _rope_cache(
    Q, Compressed, Weight, Positions, Frequencies, Latent, KRope, Slots, Out,
    q_token, q_head, compressed_token, latent_block, latent_row, k_block, k_row,
    heads, rank, half, block_size, eps, attention_scaling,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, head tiles). The first program of a token also serves its key and latent."""
    token = tl.program_id(0).to(tl.int64)
    plane = tl.arange(0, HALF)
    fits = plane < half
    angle = tl.load(Positions + token).to(tl.float32) * tl.load(Frequencies + plane, mask=fits, other=0.0)
    cos = tl.cos(angle) * attention_scaling
    sin = tl.sin(angle) * attention_scaling
    step = 2 if INTERLEAVED else 1
    partner = 1 if INTERLEAVED else half

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = (head < heads)[:, None] & fits[None, :]
    q = Q + token * q_token + head[:, None] * q_head + plane[None, :] * step
    real = tl.load(q, mask=live, other=0.0).to(tl.float32)
    imaginary = tl.load(q + partner, mask=live, other=0.0).to(tl.float32)
    out = Out + (token * heads + head[:, None]) * 2 * half
    _turn(real, imaginary, cos[None, :], sin[None, :], out, plane[None, :], half, live)

    slot = tl.load(Slots + token)
    if (tl.program_id(1) == 0) & (slot >= 0):
        block = slot // block_size
        offset = slot % block_size
        column = tl.arange(0, RANK)
        inside = column < rank
        latent = tl.load(Compressed + token * compressed_token + column, mask=inside, other=0.0)
        wide = latent.to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / rank + eps)
        # The stock norm rounds before it multiplies by its weight.
        scaled = tl.load(Weight + column, mask=inside, other=0.0) * wide.to(latent.dtype)
        tl.store(
            Latent + block * latent_block + offset * latent_row + column,
            scaled.to(Latent.dtype.element_ty),
            mask=inside,
        )
        k = Compressed + token * compressed_token + rank + plane * step
        real_k = tl.load(k, mask=fits, other=0.0).to(tl.float32)
        imaginary_k = tl.load(k + partner, mask=fits, other=0.0).to(tl.float32)
        _turn(real_k, imaginary_k, cos, sin, KRope + block * k_block + offset * k_row, plane, half, fits)


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
    """As `reference.rope_cache`."""
    tokens, heads, width = q_rope.shape
    out = torch.empty(tokens, heads, width, dtype=q_rope.dtype, device=q_rope.device)
    tile = min(32, 1 << (heads - 1).bit_length())
    _rope_cache[(tokens, -(-heads // tile))](
        q_rope, compressed, norm_weight, positions, frequencies, latent_cache, k_rope_cache, slots, out,
        *q_rope.stride()[:2], compressed.stride(0), *latent_cache.stride()[:2], *k_rope_cache.stride()[:2],
        heads, norm_weight.shape[0], width // 2, latent_cache.shape[1], eps, attention_scaling,
        INTERLEAVED=interleaved, HEADS=tile, RANK=1 << (norm_weight.shape[0] - 1).bit_length(),
        HALF=1 << (width // 2 - 1).bit_length(), num_warps=4,
    )  # fmt: skip
    return out
