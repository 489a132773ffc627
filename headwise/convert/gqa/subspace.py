"""The rows of a layer that may be mixed with each other, and what errors in them cost: mathematics, section 2.

Keys live in one complex plane per rotary frequency, because complex maps of a plane are those that commute with
RoPE; position-free key rows and values are plain real vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headwise.convert.gqa.methods import root, solve
from headwise.models.layout import LayerWeights, planes

# The coarser dtype in which heads are compared with each other before they are merged.
COARSE = {torch.float64: torch.float32, torch.complex128: torch.complex64}


@dataclass(frozen=True)
class Space:
    """Rows of all key-value heads that may be mixed with each other, and what an error in them costs.

    `rows` (batch, G, n, inputs): batch entries never mix (one per rotary plane); `seen` is `rows @ moment` of the
    inputs, so that `rows seen^H` are second moments. `costs` (batch, G, n, n): an error e in head j is expected
    to cost `e^H costs_j e`. `fixed` marks batch entries under a query-key norm, where only a sign (a phase, if
    `free`) may be given to a head.
    """

    kind: str
    rows: Tensor
    seen: Tensor
    costs: Tensor
    fixed: bool = False
    free: Tensor | None = None

    @cached_property
    def own(self) -> Tensor:
        """E[row_j row_j^H] of every head, (batch, G, n, n)."""
        heads = range(self.rows.shape[1])
        return torch.stack([self.rows[:, j] @ self.seen[:, j].mH for j in heads], 1)

    @cached_property
    def balanced(self) -> Tensor:
        """The costs with every head counted by the root of its energy instead of its energy.

        What a layer's scores and outputs are worth to the model does not grow with their square: by energy alone
        a loud head takes the shared rows for itself. Halving the exponent lowered the damage on every real model
        tried (docs/results/heads.md).
        """
        energy = (self.costs * self.own.mT).sum((-2, -1)).real
        silent = energy <= 0
        return self.costs / energy.masked_fill(silent, 1).sqrt()[..., None, None]

    def gram(self, group: Sequence[int]) -> Tensor:
        """E[row_i row_j^H] over the members of a group, (batch, g, n, g, n)."""
        batch, _, n, _ = self.rows.shape
        found = self.own.new_empty(batch, len(group), n, len(group), n)
        for i, a in enumerate(group):
            found[:, i, :, i] = self.own[:, a]
            for j, b in enumerate(group[:i]):
                found[:, i, :, j] = self.rows[:, a] @ self.seen[:, b].mH
                found[:, j, :, i] = found[:, i, :, j].mH
        return self._real(found.flatten(3, 4).flatten(1, 2)).reshape(found.shape)

    def energy(self, components: int | None = None) -> Tensor:
        """E[(R_i row_i)(R_j row_j)^H] over all heads, (batch, G, n, G, n), with R^H R the balanced costs.

        Of heads with more rows than `components`, that many leading principal components stand for all.
        """
        weight, _ = root(self.balanced)
        if components is not None and components < weight.shape[-1]:
            basis = solve(torch.linalg.eigh, weight @ self.own @ weight.mH)[1][..., -components:]
            weight = basis.mH @ weight
        dtype = COARSE[self.rows.dtype]

        def weighted(every: Tensor) -> Tensor:
            parts = [(weight[:, j] @ every[:, j]).to(dtype) for j in range(every.shape[1])]
            return torch.cat(parts, 1)

        stack = weighted(self.rows)
        gram = stack @ (stack if self.seen is self.rows else weighted(self.seen)).mH
        heads = self.rows.shape[1]
        return self._real(gram.to(self.rows.dtype)).unflatten(2, (heads, -1)).unflatten(1, (heads, -1))

    def _real(self, gram: Tensor) -> Tensor:
        """Without imaginary parts where only a sign may be given."""
        if not (self.fixed and self.free is not None):
            return gram
        return torch.where(self.free[:, None, None], gram, gram.real.to(gram.dtype))


def all_spaces(weights: LayerWeights, moment: Tensor | None, value_moment: Tensor | None) -> list[Space]:
    return [
        *key_spaces(weights, moment),
        value_space(weights, moment if value_moment is None else value_moment),
    ]


def key_spaces(weights: LayerWeights, moment: Tensor | None) -> list[Space]:
    """One space of complex planes for the rotary rows, one of real vectors for the position-free rows.

    The cost of a key error is the energy of the queries that read it: `e_h = E|q_{h,f}|^2`, summed over the
    query heads of the key-value head (mathematics, section 2). Under a query-key norm, rows are taken as the
    norm leaves them: divided by their expected root-mean-square.
    """
    layout, r = weights.layout, weights.layout.rotary_dim
    groups, reads = layout.num_key_value_heads, layout.queries_per_group
    q, k = weights.q, weights.k
    q_seen = see(q, moment)
    reading = row_energies(q, q_seen)  # of every query row, (H, head_dim)
    normed = weights.k_norm is not None
    if weights.q_norm is not None:
        reading = reading * (weights.q_norm / root_mean_square(reading, weights.norm_scope)).square()
    if weights.k_norm is not None:
        k = k / root_mean_square(row_energies(k, see(k, moment)), weights.norm_scope)[:, :, None]
        if weights.norm_scope == "all":
            k = weights.k_norm[:, :, None] * k
        else:
            reading = weights.k_norm.repeat_interleave(reads, 0).square() * reading
    reading = reading.unflatten(0, (groups, reads)).sum(1)
    k_seen = see(k, moment)

    found = []
    if r:
        in_planes = planes(k, r).transpose(0, 1).unsqueeze(2)
        seen = in_planes if k_seen is k else planes(k_seen, r).transpose(0, 1).unsqueeze(2)
        cost = reading[:, :r].unflatten(1, (2, -1)).sum(1).T[:, :, None, None].to(in_planes.dtype)
        free = _equal_on_planes(weights) if normed else None
        found.append(Space("rotary", in_planes, seen, cost, fixed=normed, free=free))
    if r < layout.head_dim and normed:
        # The norm's weight forbids mixing rows: each row is a space of its own, up to a sign.
        apart, seen = (rest[:, r:].transpose(0, 1).unsqueeze(2) for rest in (k, k_seen))
        found.append(Space("position-free", apart, seen, reading[:, r:].T[:, :, None, None], fixed=True))
    elif r < layout.head_dim:
        cost = q[:, r:] @ q_seen[:, r:].mT
        cost = cost.unflatten(0, (groups, reads)).sum(1)[None]
        found.append(Space("position-free", k[None, :, r:], k_seen[None, :, r:], cost))
    return found


def value_space(weights: LayerWeights, moment: Tensor | None) -> Space:
    """Values, whose errors cost what the output matrices make of them: `sum_h W_o[h]^T W_o[h]`."""
    layout = weights.layout
    cost = (weights.o.mT @ weights.o).unflatten(0, (layout.num_key_value_heads, layout.queries_per_group)).sum(1)
    v = weights.v[None]
    return Space("value", v, v if moment is None else see(weights.v, moment)[None], cost[None])


def root_mean_square(energies: Tensor, scope: str | None) -> Tensor:
    """Expected root-mean-square an RMSNorm divides by, from the energies of its rows (heads, rows).

    (heads, 1), or (1, 1) for the scope "all".
    """
    mean = energies.mean(-1, keepdim=True) if scope == "head" else energies.mean().reshape(1, 1)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()


def see(rows: Tensor, moment: Tensor | None) -> Tensor:
    return rows if moment is None else rows @ moment


def row_energies(rows: Tensor, seen: Tensor) -> Tensor:
    """E|row x|^2 of every row, (heads, rows)."""
    return torch.einsum("hri,hri->hr", rows, seen)


def _equal_on_planes(weights: LayerWeights) -> Tensor:
    """Planes on which every norm weight is the same for both rows: there a rotation passes through the norm."""
    half = weights.layout.rotary_dim // 2
    equal = torch.ones(half, dtype=torch.bool, device=weights.q.device)
    for norm in (weights.q_norm, weights.k_norm):
        if norm is not None:
            equal &= (norm[:, :half] == norm[:, half : 2 * half]).all(0)
    return equal
