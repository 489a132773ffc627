"""Loss as a function of position: what a longer context is worth, and where it breaks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.measure.curve import Curve as PositionLoss
from headwise.measure.loss import token_nats


def overlapping(blocks: Tensor, length: int, stride: int) -> Tensor:
    """Windows of a token stream, `stride` apart: each token stands once in each stretch of `stride` positions.

    Without this the stretches of a curve hold different text, and its slope is noise.

    Args:
        blocks: token ids (blocks, any length), read one after another.
        length: tokens in a window.
        stride: tokens between two windows.

    Returns:
        (windows, length).
    """
    return blocks.flatten().unfold(0, length, stride).contiguous()


@torch.inference_mode()
def loss_by_position(model: Any, blocks: Tensor, *, width: int, batch_size: int = 1) -> PositionLoss:
    """The curve of a model on blocks of tokens.

    Args:
        model: a causal language model.
        blocks: token ids, (blocks, length); length a multiple of `width`.
        width: positions in a stretch.
        batch_size: blocks at once.

    Raises:
        ValueError: the length is no multiple of the width.
    """
    if blocks.shape[1] % width:
        raise ValueError(f"blocks of {blocks.shape[1]} tokens have no whole number of stretches of {width}")
    return curve_of(token_nats(model, blocks, batch_size=batch_size), width)


def curve_of(nats: Tensor, width: int) -> PositionLoss:
    """The curve from `token_nats`, (blocks, length - 1), with length a multiple of `width`."""
    nats = nats.double()
    # Position 0 is given, not predicted: the first stretch has one token less.
    by_position = torch.cat([nats[:, :1].mean(0), nats.mean(0)])
    curve = by_position.unflatten(0, (-1, width)).mean(1)
    curve[0] = nats[:, : width - 1].mean()
    return PositionLoss(tuple(curve.tolist()), width, nats.numel())
