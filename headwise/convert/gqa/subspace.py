"""The rows of a layer that a merge may mix with each other, and what errors in them cost: mathematics, section 2.

Keys live in one complex plane per rotary frequency, because complex maps of a plane are those that commute with
RoPE. Position-free key rows and values are plain real vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headwise.convert.linalg import single_threaded_lapack, sqrt_and_pinv
from headwise.models.layout import LayerWeights, to_planes

# The precision in which heads are compared with each other, before they are grouped.
COARSE_DTYPE = {torch.float64: torch.float32, torch.complex128: torch.complex64}


@dataclass(frozen=True)
class MergeSubspace:
    """Rows of all KV heads that may be mixed with each other, and what an error in them costs.

    Attributes:
        kind: "rotary", "position-free" or "value".
        rows: (batch, G, n, inputs). Entries of the batch never mix: there is one per rotary plane.
        rows_moment: `rows @ moment` of the inputs, so that `rows @ rows_moment^H` are second moments.
        costs: (batch, G, n, n): an error e in head j is expected to cost `e^H costs_j e`.
        sign_only: the rows are under a query-key norm: a head may be given a sign, and nothing else.
        phase_allowed: (batch,) the entries in which it may be given a phase instead; None where none may.
    """

    kind: str
    rows: Tensor
    rows_moment: Tensor
    costs: Tensor
    sign_only: bool = False
    phase_allowed: Tensor | None = None

    @cached_property
    def head_gram(self) -> Tensor:
        """Return E[row_j row_j^H] of every head, (batch, G, n, n)."""
        heads = range(self.rows.shape[1])
        return torch.stack([self.rows[:, j] @ self.rows_moment[:, j].mH for j in heads], 1)

    @cached_property
    def balanced_cost(self) -> Tensor:
        """Return the costs with every head weighted by the square root of its energy, (batch, G, n, n).

        The damage to the model grows more slowly than the squared error of a layer's scores and outputs: weighting
        by energy lets high-norm heads dominate the shared rows. Halving the exponent lowered the damage on every
        real model tried (docs/results/heads.md).
        """
        energy = (self.costs * self.head_gram.mT).sum((-2, -1)).real
        absent = energy <= 0
        return self.costs / energy.masked_fill(absent, 1).sqrt()[..., None, None]

    @property
    def total_energy(self) -> float:
        """Return the expected cost of replacing all rows by zero."""
        return float((self.costs * self.head_gram.mT).sum().real)

    def gram(self, group: Sequence[int]) -> Tensor:
        """Return E[row_i row_j^H] over the members of a group, (batch, g, n, g, n).

        Args:
            group: the members, as indices of KV heads.
        """
        batch, _, n, _ = self.rows.shape
        gram = self.head_gram.new_empty(batch, len(group), n, len(group), n)
        for i, a in enumerate(group):
            gram[:, i, :, i] = self.head_gram[:, a]
            for j, b in enumerate(group[:i]):
                gram[:, i, :, j] = self.rows[:, a] @ self.rows_moment[:, b].mH
                gram[:, j, :, i] = gram[:, i, :, j].mH
        return self._drop_forbidden_phases(gram.flatten(3, 4).flatten(1, 2)).reshape(gram.shape)

    def energy(self, num_components: int | None = None) -> Tensor:
        """Return E[(R_i row_i)(R_j row_j)^H] over all heads, with R^H R the balanced costs.

        Args:
            num_components: the number of leading principal components that stand for a head with more rows than
                that; None keeps all rows.

        Returns:
            (batch, G, n, G, n), computed in half the precision of the rows.
        """
        weight, _ = sqrt_and_pinv(self.balanced_cost)
        if num_components is not None and num_components < weight.shape[-1]:
            weighted_gram = weight @ self.head_gram @ weight.mH
            basis = single_threaded_lapack(torch.linalg.eigh, weighted_gram)[1][..., -num_components:]
            weight = basis.mH @ weight
        dtype = COARSE_DTYPE[self.rows.dtype]

        def weighted(every: Tensor) -> Tensor:
            parts = [(weight[:, j] @ every[:, j]).to(dtype) for j in range(every.shape[1])]
            return torch.cat(parts, 1)

        stack = weighted(self.rows)
        gram = stack @ (stack if self.rows_moment is self.rows else weighted(self.rows_moment)).mH
        heads = self.rows.shape[1]
        gram = self._drop_forbidden_phases(gram.to(self.rows.dtype))
        energy: Tensor = gram.unflatten(2, (heads, -1)).unflatten(1, (heads, -1))
        return energy

    def _drop_forbidden_phases(self, gram: Tensor) -> Tensor:
        """Remove the imaginary parts where a head may be given a sign only."""
        if not (self.sign_only and self.phase_allowed is not None):
            return gram
        return torch.where(self.phase_allowed[:, None, None], gram, gram.real.to(gram.dtype))


def merge_subspaces(
    weights: LayerWeights, moment: Tensor | None, value_moment: Tensor | None, states_moment: Tensor | None = None
) -> list[MergeSubspace]:
    """Return the subspaces of a layer: those of its keys, then that of its values.

    Args:
        weights: the layer, float64.
        moment: (inputs, inputs) E[x x^T] of the attention input; None stands for the identity.
        value_moment: the same of inputs averaged by the attention; None stands for `states_moment`.
        states_moment: the same of what keys and values are made from, the encoder's output in cross-attention; None
            stands for `moment`.
    """
    if states_moment is None:
        states_moment = moment
    return [
        *key_subspaces(weights, moment, states_moment),
        value_subspace(weights, states_moment if value_moment is None else value_moment),
    ]


def key_subspaces(
    weights: LayerWeights, moment: Tensor | None, states_moment: Tensor | None = None
) -> list[MergeSubspace]:
    """Return one subspace of complex planes for the rotary key rows, one of vectors for the position-free ones.

    The cost of a key error is the energy of the queries that multiply it: `e_h = E|q_{h,f}|^2`, summed over the
    query heads of the KV head (mathematics, section 2). Under a query-key norm, rows are taken as they leave the
    norm: divided by their expected root-mean-square.

    Args:
        weights: the layer, float64.
        moment: (inputs, inputs) E[x x^T] of the attention input; None stands for the identity.
        states_moment: the same of what the keys are made from; None stands for `moment`.
    """
    if states_moment is None:
        states_moment = moment
    layout, r = weights.layout, weights.layout.rotary_dim
    groups, reads = layout.num_key_value_heads, layout.queries_per_group
    q, k = weights.q, weights.k
    q_moment = times_moment(q, moment)
    query_energy = row_energies(q, q_moment)  # of every query row, (H, head_dim)
    normed = weights.k_norm is not None
    if weights.q_norm is not None:
        query_energy = query_energy * (weights.q_norm / expected_rms(query_energy, weights.norm_scope)).square()
    if weights.k_norm is not None:
        k = k / expected_rms(row_energies(k, times_moment(k, states_moment)), weights.norm_scope)[:, :, None]
        if weights.norm_scope == "all":
            k = weights.k_norm[:, :, None] * k
        else:
            query_energy = weights.k_norm.repeat_interleave(reads, 0).square() * query_energy
    query_energy = query_energy.unflatten(0, (groups, reads)).sum(1)
    k_moment = times_moment(k, states_moment)

    subspaces = []
    if r:
        rows = to_planes(k, r).transpose(0, 1).unsqueeze(2)
        rows_moment = rows if k_moment is k else to_planes(k_moment, r).transpose(0, 1).unsqueeze(2)
        costs = query_energy[:, :r].unflatten(1, (2, -1)).sum(1).T[:, :, None, None].to(rows.dtype)
        phase_allowed = _equal_on_planes(weights) if normed else None
        subspaces.append(
            MergeSubspace("rotary", rows, rows_moment, costs, sign_only=normed, phase_allowed=phase_allowed)
        )
    if r < layout.head_dim and normed:
        # The norm's weight forbids mixing rows: each row is a subspace of its own, up to a sign.
        rows, rows_moment = (rest[:, r:].transpose(0, 1).unsqueeze(2) for rest in (k, k_moment))
        costs = query_energy[:, r:].T[:, :, None, None]
        subspaces.append(MergeSubspace("position-free", rows, rows_moment, costs, sign_only=True))
    elif r < layout.head_dim:
        costs = q[:, r:] @ q_moment[:, r:].mT
        costs = costs.unflatten(0, (groups, reads)).sum(1)[None]
        subspaces.append(MergeSubspace("position-free", k[None, :, r:], k_moment[None, :, r:], costs))
    return subspaces


def value_subspace(weights: LayerWeights, moment: Tensor | None) -> MergeSubspace:
    """Return the subspace of the values, whose errors cost `sum_h W_o[h]^T W_o[h]`.

    A gate multiplies every element of a head's output by a factor of its own. Then each row is a subspace of its
    own, up to a scale: a mixture of rows would get the factor of one of them.

    Args:
        weights: the layer, float64.
        moment: (inputs, inputs) E[x x^T] of the inputs that the attention averages; None stands for the identity.
    """
    layout = weights.layout
    gram = weights.o.mT @ weights.o
    costs = gram.unflatten(0, (layout.num_key_value_heads, layout.queries_per_group)).sum(1)
    if weights.gate is not None:
        rows = weights.v.transpose(0, 1).unsqueeze(2)
        alone = costs.diagonal(dim1=-2, dim2=-1).T[:, :, None, None].contiguous()
        return MergeSubspace("value", rows, times_moment(rows, moment), alone)
    v = weights.v[None]
    return MergeSubspace("value", v, v if moment is None else times_moment(weights.v, moment)[None], costs[None])


def expected_rms(energies: Tensor, scope: str | None) -> Tensor:
    """Return the expected root-mean-square by which an RMSNorm divides.

    Args:
        energies: (heads, rows) E|row x|^2.
        scope: "head" for a norm of one head at a time, "all" for one of all heads.

    Returns:
        (heads, 1), or (1, 1) for the scope "all".
    """
    mean = energies.mean(-1, keepdim=True) if scope == "head" else energies.mean().reshape(1, 1)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()


def times_moment(rows: Tensor, moment: Tensor | None) -> Tensor:
    """Multiply rows (..., inputs) by a moment of the inputs; None stands for the identity.

    Args:
        rows: (..., inputs).
        moment: (inputs, inputs), or None.
    """
    return rows if moment is None else rows @ moment


def row_energies(rows: Tensor, rows_moment: Tensor) -> Tensor:
    """Return E|row x|^2 of every row, (heads, rows).

    Args:
        rows: (heads, rows, inputs).
        rows_moment: the same times the moment of the inputs.
    """
    return torch.einsum("hri,hri->hr", rows, rows_moment)


def _equal_on_planes(weights: LayerWeights) -> Tensor:
    """Return the mask (rotary_dim / 2,) of the planes whose two rows have the same norm weight.

    On these planes the norm permits a rotation.
    """
    half = weights.layout.rotary_dim // 2
    equal = torch.ones(half, dtype=torch.bool, device=weights.q.device)
    for norm in (weights.q_norm, weights.k_norm):
        if norm is not None:
            equal &= (norm[:, :half] == norm[:, half : 2 * half]).all(0)
    return equal
