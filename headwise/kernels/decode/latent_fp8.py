"""Latents in FP8 (e4m3): blocks of 128 numbers with a float32 scale each, beside a rotary key in bfloat16.

At a rank of 512 and a rotary key of 64 a row of the cache is that of FlashMLA: 512 bytes of latent, four scales,
128 bytes of rotary key. At other ranks the last block may be shorter. Zero bytes fill the scales up to 16 bytes,
because the kernels copy 16 bytes at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
ALIGNMENT = 16


def num_blocks(rank: int) -> int:
    """Return the number of scales of a latent.

    Args:
        rank: numbers of the latent.
    """
    return -(-rank // BLOCK)


def quantize_latent(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Round a latent to FP8: each block is divided by its scale, its largest magnitude over 448.

    Args:
        latent: (..., rank).

    Returns:
        (..., rank) e4m3, and the scales (..., blocks) float32; the scale of a block of zeros is 0.
    """
    rank, blocks = latent.shape[-1], num_blocks(latent.shape[-1])
    padded = torch.nn.functional.pad(latent.float(), (0, blocks * BLOCK - rank)).unflatten(-1, (blocks, BLOCK))
    scales = padded.abs().amax(-1) / LARGEST
    values = padded / torch.where(scales > 0, scales, 1.0)[..., None]
    return values.clamp(-LARGEST, LARGEST).to(DTYPE).flatten(-2)[..., :rank], scales


def dequantize_latent(values: Tensor, scales: Tensor) -> Tensor:
    """Return the latent of `quantize_latent` in float32.

    Args:
        values: (..., rank) e4m3.
        scales: (..., blocks) float32.
    """
    return values.float() * scales.float().repeat_interleave(BLOCK, -1)[..., : values.shape[-1]]


def row_bytes(rank: int, rope_dim: int) -> int:
    """Return the bytes of one token in the cache: 656 at 512 + 64.

    Args:
        rank: numbers of the latent, a multiple of 16.
        rope_dim: numbers of the rotary key, a multiple of 8.
    """
    return rank + _scale_bytes(rank) + 2 * rope_dim


def cache_views(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latent, scales and rotary key of a cache as views, in which they can be written and read.

    Args:
        rows: (..., row_bytes) uint8, contiguous.
        rank: numbers of the latent.

    Returns:
        (..., rank) e4m3, (..., blocks) float32 and (..., rope_dim) bfloat16.
    """
    end = rank + _scale_bytes(rank)
    scales = rows[..., rank:end].view(torch.float32)[..., : num_blocks(rank)]
    return rows[..., :rank].view(DTYPE), scales, rows[..., end:].view(torch.bfloat16)


def _scale_bytes(rank: int) -> int:
    return -(-4 * num_blocks(rank) // ALIGNMENT) * ALIGNMENT
