"""Measure the loss of a model by position: whether a longer context helps, and where the loss rises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.measure.loss import token_nats


@dataclass(frozen=True)
class PositionLoss:
    """Mean nats of the tokens in each interval of `width` positions.

    Attributes:
        nats: one mean per interval; the first interval starts at position 0.
        width: positions in an interval.
        tokens: number of predicted tokens in all intervals.
    """

    nats: tuple[float, ...]
    width: int
    tokens: int

    @property
    def length(self) -> int:
        """Return the number of positions that the intervals cover."""
        return self.width * len(self.nats)

    def before(self, position: int) -> float:
        """Return the nats of the last whole interval that ends at or before a position.

        Args:
            position: number of tokens from the start.
        """
        return self.nats[max(position // self.width - 1, 0)]

    @property
    def end(self) -> float:
        """Return the nats of the last interval."""
        return self.nats[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {"nats": list(self.nats), "width": self.width, "tokens": self.tokens}


def overlapping_windows(blocks: Tensor, length: int, stride: int) -> Tensor:
    """Cut a token stream into windows that are `stride` tokens apart.

    Each token occurs once in each interval of `stride` positions. Otherwise the intervals would hold different text
    and the differences between them would be noise.

    Args:
        blocks: token ids, (blocks, block length); the blocks are one stream, in order.
        length: tokens in a window.
        stride: tokens between the starts of two windows.

    Returns:
        Token ids, (windows, length).
    """
    return blocks.flatten().unfold(0, length, stride).contiguous()


@torch.inference_mode()
def loss_by_position(model: Any, blocks: Tensor, *, width: int, batch_size: int = 1) -> PositionLoss:
    """Measure the loss of a model on blocks of tokens, by position.

    Args:
        model: a causal language model.
        blocks: token ids, (blocks, length); `length` is a multiple of `width`.
        width: positions in an interval.
        batch_size: blocks in one forward pass.

    Returns:
        The mean nats of each interval.

    Raises:
        ValueError: `length` is not a multiple of `width`.
    """
    if blocks.shape[1] % width:
        raise ValueError(f"a length of {blocks.shape[1]} tokens is not a multiple of the width {width}")
    return average_by_position(token_nats(model, blocks, batch_size=batch_size), width)


def average_by_position(nats: Tensor, width: int) -> PositionLoss:
    """Average the nats of tokens over intervals of positions.

    Args:
        nats: result of `token_nats`, (blocks, length - 1); `length` is a multiple of `width`.
        width: positions in an interval.

    Returns:
        The mean nats of each interval.
    """
    nats = nats.double()
    # Position 0 is given, not predicted: the first interval has one token less.
    by_position = torch.cat([nats[:, :1].mean(0), nats.mean(0)])
    means = by_position.unflatten(0, (-1, width)).mean(1)
    means[0] = nats[:, : width - 1].mean()
    return PositionLoss(tuple(means.tolist()), width, nats.numel())
