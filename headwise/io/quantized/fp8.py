"""Write weights as block FP8, in the stock format of DeepSeek and Qwen3."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.io.quantized.dequantize import blocks_to_plain

BLOCK = (128, 128)
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantize_blocks(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Return a weight as codes and the scale of every block, which brings its largest element to the largest code.

    The arithmetic is that of transformers.

    Args:
        weight: (rows, columns), whole blocks.
        block: rows and columns of a block.

    Returns:
        (rows, columns) float8_e4m3fn and (rows / block rows, columns / block columns) float32.
    """
    tiles = weight.float().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    largest = tiles.abs().amax((1, 3))
    factor = torch.where(largest > 0, LARGEST / largest.where(largest > 0, torch.ones(())), torch.ones(()))
    codes = (tiles * factor[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1), (1 / factor).float()


def round_to_blocks(weight: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Return a weight as it is read after it was written as block FP8, in bfloat16.

    Args:
        weight: (rows, columns), whole blocks.
        block: rows and columns of a block.
    """
    return blocks_to_plain(*quantize_blocks(weight, block), block).to(torch.bfloat16)
