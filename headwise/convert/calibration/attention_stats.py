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
# Attention weights whose distances are summed at once, in float64.
ELEMENTS_AT_ONCE = 1 << 21


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
        states: the argument that keys and values are made from in cross-attention; None: from the input.
        merged: the mask argument of merged attention, which reads the input, then `states`; None: of no such one.
    """

    def __init__(
        self, normed: NormedProjections | None = None, states: str | None = None, merged: str | None = None
    ) -> None:
        self._normed, self.keys = normed, CrossMoment()
        self._states, self._mask, self._merged = states, merged or "attention_mask", merged is not None
        self._moment: Tensor | None = None
        self._keys: Tensor | None = None
        self._distances: Tensor | None = None
        self._weight: Tensor | float = 0.0

    def add(
        self,
        attention: Any,
        inputs: Tensor,
        arguments: dict[str, Any],
        *,
        valid: Tensor | None = None,
        most: int | None = None,
    ) -> None:
        """Add the attention weights of some inputs, from the module's own eager attention.

        Args:
            attention: the stock attention module.
            inputs: (sequences, length, D).
            arguments: further arguments of the module.
            valid: (sequences, length) how much each token counts, 0 or False for padding; None: all count alike.
            most: the largest number of sequences to read; None: all.
        """
        sequences, length = inputs.shape[:2]
        states: Tensor | None = arguments[self._states] if self._states else None
        if states is not None:  # the tiles of an image have the place of sequences
            states = states.reshape(sequences, -1, states.shape[-1])
        read = inputs if states is None else torch.cat([inputs, states], 1) if self._merged else states
        index = torch.arange(length, device=inputs.device)
        first = first_position(length)
        # The first token is a sink for the tokens after it; a decoder's queries read the encoder from its first on.
        sink = first if states is None or self._merged else 0
        causal = states is None and getattr(attention, "is_causal", True)
        mask = _additive_mask(arguments.get(self._mask), inputs, read.shape[1], causal)
        total: Tensor | None = None
        before = attention.config._attn_implementation
        attention.config._attn_implementation = "eager"
        try:
            for i in range(min(sequences, most or sequences)):
                row = {k: _row(v, i, sequences) for k, v in (arguments | {self._mask: mask}).items()}
                output = attention(hidden_states=inputs[i : i + 1], **row)
                weights = output[1] if not self._merged else torch.cat(output[1:3], -1)
                weights = weights[0]  # (heads, length, read tokens)
                # In place: each array of this size is new memory from the system.
                total = weights if total is None else total.add_(weights)
                # A slice: indices by a condition are counted on the host, which waits for a GPU.
                queries = index if valid is None else index[valid[i] > 0]
                after = index[first:] if valid is None else queries[queries >= first]
                queries = after[:: max(1, len(queries) // NUM_ATTENTION_QUERIES)]
                whole = torch.cat([read[i], torch.ones_like(read[i, :, :1])], 1)
                weights = weights[:, queries]  # a copy
                if valid is not None:
                    weights *= valid[i, queries].to(weights)[:, None]
                weights[..., :sink] = 0
                share = weights.sum(-1, keepdim=True).clamp_min(TINY)
                averaged = (weights @ whole / share.sqrt()).flatten(0, 1)
                moment = (averaged.mT @ averaged).double()
                received = weights.sum((0, 1))
                attended = (whole.mT * received) @ whole
                if self._normed is not None:
                    self.keys.add(whole, self._normed.keys(whole), received)
                self._moment = moment if self._moment is None else self._moment + moment
                self._keys = attended.double() if self._keys is None else self._keys + attended.double()
                self._weight = self._weight + share.double().sum()
        finally:
            attention.config._attn_implementation = before
        if states is None and total is not None:
            total[..., :sink] = 0
            by_distance = sum_by_distance(total)
            self._distances = by_distance if self._distances is None else _added(self._distances, by_distance)

    def result(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `value_moment`, `key_moment` and `distances` of a `LayerRecord`."""
        assert self._moment is not None and self._keys is not None
        distances = self._distances
        if distances is not None:
            distances = distances / distances.sum(-1, keepdim=True)
        return self._moment / self._weight, self._keys / self._keys[-1, -1], distances


def sum_by_distance(weights: Tensor) -> Tensor:
    """Return the sums of attention weights over equal distances between query and token, (heads, length), float64.

    The order of each sum is fixed. On a GPU, `index_add_` sums in an order that changes from run to run.

    Args:
        weights: (heads, length, length), queries by tokens.
    """
    length = weights.shape[-1]
    sums = []
    for heads in weights.split(max(1, ELEMENTS_AT_ONCE // length**2)):
        # Rows are reversed and shifted by one each, so that a column holds one distance.
        skewed = torch.nn.functional.pad(heads.flip(2).double(), (0, length)).flatten(1)[:, :-length]
        sums.append(skewed.unflatten(1, (length, 2 * length - 1)).sum(1))
    columns = torch.cat(sums)
    earlier, later = columns[:, length - 1 :], columns[:, : length - 1].flip(1)
    return torch.cat([earlier[:, :1], earlier[:, 1:] + later], 1)


def _added(*sums: Tensor) -> Tensor:
    """Return the sum of two matrices of as many rows; the narrower one gets columns of zeros."""
    width = max(each.shape[1] for each in sums)
    one, other = (torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in sums)
    return one + other


def _row(value: Any, index: int, sequences: int) -> Any:
    """Return the part of an argument that belongs to one sequence of a batch."""
    batched = isinstance(value, Tensor) and value.ndim > 2 and sequences > 1 and len(value) == sequences
    return value[index : index + 1] if batched else value


def _additive_mask(mask: Tensor | None, inputs: Tensor, read: int, causal: bool) -> Tensor:
    """Return the additive mask of eager attention, from the form that the model made for its own attention.

    Args:
        mask: the model's; None: a causal mask, or none.
        inputs: (sequences, length, D) of the queries.
        read: number of tokens that are read.
        causal: whether a query reads no later tokens.
    """
    least = torch.finfo(inputs.dtype).min
    if mask is None:
        full = torch.full((1, 1, inputs.shape[1], read), least if causal else 0.0, device=inputs.device)
        return full.triu(1) if causal else full
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=inputs.dtype).masked_fill(~mask, least)
    return mask
