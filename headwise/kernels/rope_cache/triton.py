"""Rotate, normalize and cache in one launch."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.cuda import current

# Warps of a program. Every warp computes the angles again, so more warps mean more instructions.
WARPS = 1
HEAD_TILE = 32


@triton.jit
def _cos_sin(angle):
    """Compute cosine and sine: reduction to [-pi/4, pi/4] (Cody and Waite), then two polynomials (Cephes).

    The error is below 1e-6 up to 10^6 radians. The two functions of the library take ten times the instructions,
    which would take longer than the memory traffic of the whole kernel.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = tl.fma(-quarter, 1.5703125, angle)
    x = tl.fma(-quarter, 4.837512969970703125e-4, x)
    x = tl.fma(-quarter, 7.54978995489188216e-8, x)
    square = x * x
    sine = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cosine = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * square + square * square * cosine
    quadrant = quarter.to(tl.int32)
    odd = (quadrant & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    return tl.where(((quadrant + 1) & 2) == 2, -cos, cos), tl.where((quadrant & 2) == 2, -sin, sin)


@triton.jit
def _store_rotated(real, imaginary, cos, sin, Out, plane, half, live):
    tl.store(Out + plane, (real * cos - imaginary * sin).to(Out.dtype.element_ty), mask=live)
    tl.store(Out + half + plane, (imaginary * cos + real * sin).to(Out.dtype.element_ty), mask=live)


@triton.jit
def _rope_cache(
    Q, Compressed, Weight, Positions, Frequencies, Latent, KRope, Slots, Out,
    q_token, q_head, compressed_token, latent_block, latent_row, k_block, k_row,
    heads, rank, half, block_size, eps, attention_scaling,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Process one token and one tile of heads: grid (tokens, head tiles).

    The first program of a token also writes its key and latent.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(Slots + token)
    position = tl.load(Positions + token).to(tl.float32)
    step = 2 if INTERLEAVED else 1
    partner = 1 if INTERLEAVED else half
    plane = tl.arange(0, HALF)
    fits = plane < half
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = (head < heads)[:, None] & fits[None, :]
    # All loads come before the first use, so that their latencies overlap.
    q = Q + token * q_token + head[:, None] * q_head + plane[None, :] * step
    real = tl.load(q, mask=live, other=0.0).to(tl.float32)
    imaginary = tl.load(q + partner, mask=live, other=0.0).to(tl.float32)
    cached = (slot >= 0) & (tl.program_id(1) == 0)
    column = tl.arange(0, RANK)
    inside = (column < rank) & cached
    latent = tl.load(Compressed + token * compressed_token + column, mask=inside, other=0.0)
    weight = tl.load(Weight + column, mask=inside, other=0.0)
    k = Compressed + token * compressed_token + rank + plane * step
    real_k = tl.load(k, mask=fits & cached, other=0.0).to(tl.float32)
    imaginary_k = tl.load(k + partner, mask=fits & cached, other=0.0).to(tl.float32)

    cos, sin = _cos_sin(position * tl.load(Frequencies + plane, mask=fits, other=0.0))
    cos *= attention_scaling
    sin *= attention_scaling
    out = Out + (token * heads + head[:, None]) * 2 * half
    _store_rotated(real, imaginary, cos[None, :], sin[None, :], out, plane[None, :], half, live)
    block = slot // block_size
    offset = slot % block_size
    _store_rotated(
        real_k, imaginary_k, cos, sin, KRope + block * k_block + offset * k_row, plane, half, fits & cached
    )
    wide = latent.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / rank + eps)
    # The stock norm rounds before it multiplies by its weight.
    row = Latent + block * latent_block + offset * latent_row + column
    tl.store(row, (weight * wide.to(latent.dtype)).to(Latent.dtype.element_ty), mask=inside)


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
    """Compute `reference.rope_cache` with the kernel."""
    tokens, heads, width = q_rope.shape
    out = torch.empty(tokens, heads, width, dtype=q_rope.dtype, device=q_rope.device)
    tile = min(HEAD_TILE, 1 << (heads - 1).bit_length())
    with current(q_rope.device):
        _rope_cache[(tokens, -(-heads // tile))](
            q_rope, compressed, norm_weight, positions, frequencies, latent_cache, k_rope_cache, slots, out,
            *q_rope.stride()[:2], compressed.stride(0), *latent_cache.stride()[:2], *k_rope_cache.stride()[:2],
            heads, norm_weight.shape[0], width // 2, latent_cache.shape[1], eps, attention_scaling,
            INTERLEAVED=interleaved, HEADS=tile, RANK=1 << (norm_weight.shape[0] - 1).bit_length(),
            HALF=1 << (width // 2 - 1).bit_length(), num_warps=WARPS,
        )  # fmt: skip
    return out
