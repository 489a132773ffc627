"""What attention weights tell beyond the inputs: how far a layer looks, and which averages its values are read
through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Queries per sequence, evenly spread, that are looked at. Both moments are of the same queries: their difference is
# then how much what a query reads varies, and positive semidefinite (docs/decisions/037).
QUERIES_LOOKED_AT = 64


class AttentionView:
    """Attention weights, summed up: over distances, and over the inputs they average."""

    def __init__(self) -> None:
        self._moment: Tensor | None = None
        self._keys: Tensor | None = None
        self._distances: Tensor | None = None
        self._count = 0

    def add(self, attention: Any, inputs: Tensor, arguments: dict[str, Any]) -> None:
        """Look at (sequences, length, D) inputs through the module's own eager attention."""
        length = inputs.shape[1]
        index = torch.arange(length, device=inputs.device)
        distance = (index[:, None] - index[None]).clamp_min(0).flatten()
        queries = index[:: max(1, length // QUERIES_LOOKED_AT)]
        arguments = {**arguments, "attention_mask": _additive_mask(arguments.get("attention_mask"), inputs)}
        before = attention.config._attn_implementation
        attention.config._attn_implementation = "eager"
        try:
            for row in inputs.split(1):
                weights = attention(hidden_states=row, **arguments)[1][0]  # (heads, length, length)
                found = weights.new_zeros(weights.shape[0], length, dtype=torch.float64)
                found.index_add_(1, distance, weights.tril().flatten(1).double())
                averaged = (weights[:, queries] @ row[0]).flatten(0, 1)
                averaged = torch.cat([averaged, torch.ones_like(averaged[:, :1])], 1)
                moment = (averaged.mT @ averaged).double()
                whole = torch.cat([row[0], torch.ones_like(row[0, :, :1])], 1)
                attended = (whole.mT * weights[:, queries].sum((0, 1))) @ whole
                self._moment = moment if self._moment is None else self._moment + moment
                self._keys = attended.double() if self._keys is None else self._keys + attended.double()
                self._distances = found if self._distances is None else self._distances + found
                self._count += len(averaged)
        finally:
            attention.config._attn_implementation = before

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """`value_moment`, `key_moment` and `distances` of a `LayerRecord`."""
        assert self._moment is not None and self._keys is not None and self._distances is not None
        distances = self._distances / self._distances.sum(-1, keepdim=True)
        return self._moment / self._count, self._keys / self._keys[-1, -1], distances


def _additive_mask(mask: Tensor | None, inputs: Tensor) -> Tensor:
    """The mask eager attention adds to the scores, from whichever form the model made for its own attention."""
    least = torch.finfo(inputs.dtype).min
    if mask is None:
        length = inputs.shape[1]
        return torch.full((1, 1, length, length), least, device=inputs.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=inputs.dtype).masked_fill(~mask, least)
    return mask
