"""Compare tensors with those of a folder that stores some of them in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from headwise.io.quantized.forms import FORMS
from headwise.io.quantized.fp8 import BLOCK, round_to_blocks
from headwise.io.reader import Checkpoint


def holds_chunks(checkpoint: Checkpoint, name: str, expected: Iterable[Tensor]) -> bool:
    """Return whether a folder has a tensor that is computed chunk by chunk, exactly or as block FP8 rounds it.

    Args:
        checkpoint: the folder.
        name: of the tensor.
        expected: its values before they were stored, flat, in order.
    """
    shape = checkpoint.tensors[name].shape
    if checkpoint.quantized is not None and name in checkpoint.quantized.tensors:
        whole = torch.cat(list(expected))
        return whole.numel() == math.prod(shape) and is_stored(checkpoint, name, whole.view(shape))
    actual, start = checkpoint.read(name).flatten(), 0
    for chunk in expected:
        if not torch.equal(chunk, actual[start : start + len(chunk)]):
            return False
        start += len(chunk)
    return start == len(actual)


def is_stored(checkpoint: Checkpoint, name: str, expected: Tensor) -> bool:
    """Return whether a folder has a tensor, exactly or as block FP8 rounds it.

    Args:
        checkpoint: the folder.
        name: of the tensor.
        expected: its values before they were stored.
    """
    actual = checkpoint.read(name)
    if torch.equal(expected, actual):
        return True
    if checkpoint.quantized is None or name not in checkpoint.quantized.tensors or expected.dim() != 2:
        return False
    whole = not any(size % block for size, block in zip(expected.shape, BLOCK, strict=True))
    return whole and torch.equal(round_to_blocks(expected), actual)


def rounds_weights(checkpoint: Checkpoint) -> bool:
    """Return whether a folder stores weights in fewer bits than they are computed in, as headwise writes them.

    Weights of a form that is carried over from the parent are not rounded.

    Args:
        checkpoint: the folder.
    """
    return checkpoint.quantized is not None and not all(form.carried for form in FORMS[checkpoint.quantized.method])
