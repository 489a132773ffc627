"""Measure attention weights: their distances, and the moments of the inputs that they average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.convert.calibration.norm_stats import CrossMoment, NormedProjections

# Queries per sequence, evenly spread, that are measured. Both moments come from the same queries, so their
# difference, a variance over queries, is positive semidefinite (docs/decisions/0013).
NUM_ATTENTION_QUERIES = 64
TINY = 1e-9


def first_position(length: int) -> int:
    """Return the first position that counts in moments: 1, or 0 for sequences of one token.

    Position 0 is an attention sink in most models: a token of huge norm whose value hardly matters. In the moments
    it hides the tokens that do (mathematics, section 7a).

    Args:
        length: tokens in a sequence.
    """
    return min(1, length - 1)


class AttentionStats:
    """Sums of attention weights over distances, and of the inputs that they average.

    Args:
        normed: the layer's normed keys, whose moments are also taken; None: they are not.
    """

    def __init__(self, normed: NormedProjections | None = None) -> None:
        self._normed, self.keys = normed, CrossMoment()
        self._moment: Tensor | None = None
        self._keys: Tensor | None = None
        self._distances: Tensor | None = None
        self._weight = 0.0

    def add(self, attention: Any, inputs: Tensor, arguments: dict[str, Any]) -> None:
        """Add the attention weights of some inputs, from the module's own eager attention.

        Args:
            attention: the stock attention module.
            inputs: (sequences, length, D).
            arguments: further arguments of the module.
        """
        length = inputs.shape[1]
        index = torch.arange(length, device=inputs.device)
        distance = (index[:, None] - index[None]).clamp_min(0).flatten()
        first = first_position(length)
        queries = index[first :: max(1, length // NUM_ATTENTION_QUERIES)]
        arguments = {**arguments, "attention_mask": _additive_mask(arguments.get("attention_mask"), inputs)}
        before = attention.config._attn_implementation
        attention.config._attn_implementation = "eager"
        try:
            for row in inputs.split(1):
                weights = attention(hidden_states=row, **arguments)[1][0]  # (heads, length, length)
                weights = weights.clone()
                weights[..., :first] = 0
                by_distance = weights.new_zeros(weights.shape[0], length, dtype=torch.float64)
                by_distance.index_add_(1, distance, weights.tril().flatten(1).double())
                whole = torch.cat([row[0], torch.ones_like(row[0, :, :1])], 1)
                share = weights[:, queries].sum(-1, keepdim=True).clamp_min(TINY)
                averaged = (weights[:, queries] @ whole / share.sqrt()).flatten(0, 1)
                moment = (averaged.mT @ averaged).double()
                received = weights[:, queries].sum((0, 1))
                attended = (whole.mT * received) @ whole
                if self._normed is not None:
                    self.keys.add(whole, self._normed.keys(whole), received)
                self._moment = moment if self._moment is None else self._moment + moment
                self._keys = attended.double() if self._keys is None else self._keys + attended.double()
                self._distances = by_distance if self._distances is None else self._distances + by_distance
                self._weight += float(share.sum())
        finally:
            attention.config._attn_implementation = before

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `value_moment`, `key_moment` and `distances` of a `LayerRecord`."""
        assert self._moment is not None and self._keys is not None and self._distances is not None
        distances = self._distances / self._distances.sum(-1, keepdim=True)
        return self._moment / self._weight, self._keys / self._keys[-1, -1], distances


def _additive_mask(mask: Tensor | None, inputs: Tensor) -> Tensor:
    """Return the additive mask of eager attention, from the form that the model made for its own attention."""
    least = torch.finfo(inputs.dtype).min
    if mask is None:
        length = inputs.shape[1]
        return torch.full((1, 1, length, length), least, device=inputs.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=inputs.dtype).masked_fill(~mask, least)
    return mask
