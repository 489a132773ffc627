"""Measure what an RMSNorm on queries and keys does: moments of the normed rows with the attention's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.models.layout import LayerWeights


@dataclass(frozen=True)
class NormedProjections:
    """The queries and keys of one layer, before RoPE.

    Attributes:
        weights: the layer with norms on queries and keys.
        eps: of the norms.
    """

    weights: LayerWeights
    eps: float

    def queries(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales of the norm, (tokens, heads), and the normed queries, (tokens, heads, head_dim).

        Args:
            inputs: (tokens, D + 1), with a constant 1 in the last column.
        """
        return self._normed(self.weights.q, self.weights.q_norm, inputs)

    def keys(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same of the keys.

        Args:
            inputs: (tokens, D + 1), with a constant 1 in the last column.
        """
        return self._normed(self.weights.k, self.weights.k_norm, inputs)

    def _normed(self, rows: Tensor, multiplier: Tensor | None, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if multiplier is None:
            raise ValueError("the layer has no norms on queries and keys")
        plain = torch.einsum("hdi,ti->thd", rows.to(inputs), inputs[:, : rows.shape[2]])
        size = plain.square().mean(-1)
        if self.weights.norm_scope == "all":
            size = size.mean(-1, keepdim=True).expand_as(size)
        scales = torch.rsqrt(size + self.eps)
        return scales, scales[..., None] * plain * multiplier.to(inputs)


class CrossMoment:
    """Sums of normed rows times the attention's inputs over tokens, and of the norm's scales."""

    def __init__(self) -> None:
        self._cross: Tensor | None = None
        self._scales: Tensor | None = None
        self._weight: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, inputs: Tensor, normed: tuple[Tensor, Tensor], weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: (tokens, D + 1), with a constant 1 in the last column.
            normed: the scales and rows of `NormedProjections`.
            weights: (tokens,); None: 1 each.
        """
        scales, rows = normed
        weights = torch.ones_like(inputs[:, 0]) if weights is None else weights
        cross = (rows.flatten(1).mT @ (weights[:, None] * inputs)).unflatten(0, rows.shape[1:]).double()
        energy = rows.square().sum(-1)
        sums = torch.stack([scales, scales.square(), energy]).double()
        sums = torch.einsum("sth,t->sh", sums, weights.double())
        self._cross = cross if self._cross is None else self._cross + cross
        self._scales = sums if self._scales is None else self._scales + sums
        self._weight = self._weight + weights.double().sum()
        self._squares = self._squares + weights.double().square().sum()

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the cross moment and the scales of a `LayerRecord`."""
        assert self._cross is not None and self._scales is not None
        count = torch.as_tensor(self._weight**2 / self._squares).expand_as(self._scales[:1])
        return self._cross / self._weight, torch.cat([self._scales / self._weight, count])
