"""Fewer (or more) key-value heads for one attention layer: mathematics, sections 1 to 3.

A group of g key-value heads becomes one. Every method answers the same question in the same form: which rows
should the group share, and by which map does each member's row come back from them,

    rows_j  ~  maps_j @ shared.

The maps then disappear into the queries (`q <- maps^H q`) or into the output matrix (`o <- o maps`), so the
converted layer is an ordinary grouped layer. Keys live in one complex plane per rotary frequency, because those
are the maps that commute with RoPE; position-free key rows and values are plain real vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.convert.grouping import choose_groups
from headwise.convert.layout import LayerWeights, planes, rows
from headwise.convert.methods import METHODS, phased, root, second_moment


@dataclass(frozen=True)
class MergeReport:
    """What merging a layer is expected to cost.

    `key_error` is the expected squared error of the attention scores and `value_error` that of the layer's
    output for given attention weights, each relative to the energy of what is approximated (0: exact).
    `groups` lists the source key-value heads that each new head stands for.
    """

    groups: tuple[tuple[int, ...], ...]
    key_error: float
    value_error: float


def merge(
    weights: LayerWeights,
    num_key_value_heads: int,
    *,
    method: str = "optimal",
    grouping: str = "optimal",
    moment: Tensor | None = None,
    key_moment: Tensor | None = None,
    value_moment: Tensor | None = None,
    seed: int = 0,
) -> tuple[LayerWeights, MergeReport]:
    """The layer with another number of key-value heads.

    More heads are exact replicas. The same number returns the layer untouched. Fewer are merged.

    Args:
        weights: the source layer, float64.
        num_key_value_heads: a divisor of the layer's own number, or a multiple that divides its query heads.
        method: one of `methods.METHODS`.
        grouping: "optimal" chooses which heads share by least residual energy, "contiguous" takes neighbours.
        moment: E[x x^T] of the attention input, (inputs, inputs), with the constant 1 appended where the layer
            has biases; None stands for the identity.
        key_moment: the same with every token counted by the attention it gets, which is where keys matter.
        value_moment: the same of inputs averaged by the layer's attention, which is what values are read
            through. None stands for `moment`, here and for keys.
        seed: for the method "random".

    Raises:
        ValueError: the head count is not reachable from the layer's own.
    """
    source = weights.layout.num_key_value_heads
    heads = weights.layout.num_attention_heads
    identity = tuple((j,) for j in range(source))
    if num_key_value_heads == source:
        return weights, MergeReport(identity, 0.0, 0.0)
    if num_key_value_heads > source:
        if num_key_value_heads % source or heads % num_key_value_heads:
            raise ValueError(f"{source} key-value heads cannot be replicated to {num_key_value_heads}")
        return replicate(weights, num_key_value_heads // source), MergeReport(identity, 0.0, 0.0)
    if num_key_value_heads < 1 or source % num_key_value_heads:
        raise ValueError(f"{source} key-value heads cannot be merged into {num_key_value_heads}")

    size = source // num_key_value_heads
    spaces = [
        *key_spaces(weights, moment, key_moment),
        value_space(weights, moment if value_moment is None else value_moment),
    ]
    if grouping == "optimal" and num_key_value_heads > 1:
        groups = choose_groups([space.energy() for space in spaces], size)
    else:
        groups = [list(range(j, j + size)) for j in range(0, source, size)]

    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(size, (len(groups),), generator=generator).tolist()
        groups = [[g[pick], *g[:pick], *g[pick + 1 :]] for g, pick in zip(groups, picks, strict=True)]
    blended = [_blend(space, groups, method) for space in spaces]
    merged = _assemble(weights, spaces, blended, groups, moment)
    key_blends = [b for s, b in zip(spaces, blended, strict=True) if s.kind != "value"]
    value_blends = [b for s, b in zip(spaces, blended, strict=True) if s.kind == "value"]
    return merged, MergeReport(
        tuple(tuple(g) for g in groups), _relative_error(key_blends), _relative_error(value_blends)
    )


def replicate(weights: LayerWeights, times: int) -> LayerWeights:
    """Every key-value head `times` times over: the same function, bit for bit (mathematics, section 3)."""
    layout = weights.layout.with_groups(weights.layout.num_key_value_heads * times)
    k_norm = None if weights.k_norm is None else weights.k_norm.repeat_interleave(times, 0)
    return replace(
        weights,
        layout=layout,
        k=weights.k.repeat_interleave(times, 0),
        v=weights.v.repeat_interleave(times, 0),
        k_norm=k_norm,
    )


@dataclass(frozen=True)
class Space:
    """Rows of all key-value heads that may be mixed with each other, and what an error in them costs.

    `rows` (batch, G, n, inputs): batch entries never mix (one per rotary plane). `costs` (batch, G, n, n):
    an error e in head j is expected to cost `e^H costs_j e`. `moment` is that of the inputs. `fixed` marks
    batch entries under a query-key norm, where only a sign (a phase, if `free`) may be given to a head.
    """

    kind: str
    rows: Tensor
    costs: Tensor
    moment: Tensor | None
    fixed: bool = False
    free: Tensor | None = None

    @property
    def balanced(self) -> Tensor:
        """The costs with every head counted by the root of its energy instead of its energy.

        What a layer's scores and outputs are worth to the model does not grow with their square: by energy alone
        a loud head takes the shared rows for itself. Halving the exponent lowered the damage on every real model
        tried (docs/results/heads.md).
        """
        energy = (self.costs * second_moment(self.rows, self.rows, self.moment).mT).sum((-2, -1)).real
        silent = energy <= 0
        return self.costs / energy.masked_fill(silent, 1).sqrt()[..., None, None]

    def energy(self) -> Tensor:
        """E[(R_i row_i)(R_j row_j)^H] over all heads, (batch, G, n, G, n), with R^H R the balanced costs."""
        weight, _ = root(self.balanced)
        batch, heads, n, inputs = self.rows.shape
        stack = (weight @ self.rows).reshape(batch, heads * n, inputs)
        gram = second_moment(stack, stack, self.moment)
        if self.fixed and self.free is not None:
            gram = torch.where(self.free[:, None, None], gram, gram.real.to(gram.dtype))
        return gram.reshape(batch, heads, n, heads, n)


def key_spaces(weights: LayerWeights, moment: Tensor | None, key_moment: Tensor | None = None) -> list[Space]:
    """One space of complex planes for the rotary rows, one of real vectors for the position-free rows.

    The cost of a key error is the energy of the queries that read it: `e_h = E|q_{h,f}|^2`, summed over the
    query heads of the key-value head (mathematics, section 2). Under a query-key norm, rows are taken as the
    norm leaves them: divided by their expected root-mean-square.
    """
    keys = moment if key_moment is None else key_moment
    layout, r = weights.layout, weights.layout.rotary_dim
    groups, reads = layout.num_key_value_heads, layout.queries_per_group
    q, k = weights.q, weights.k
    normed = weights.k_norm is not None
    if weights.q_norm is not None:
        q = weights.q_norm[:, :, None] * q / root_mean_square(q, moment, weights.norm_scope)
    if weights.k_norm is not None:
        k = k / root_mean_square(k, moment, weights.norm_scope)
        if weights.norm_scope == "all":
            k = weights.k_norm[:, :, None] * k
        else:
            q = weights.k_norm.repeat_interleave(reads, 0)[:, :, None] * q

    found = []
    if r:
        planes_q = planes(q, r).unflatten(0, (groups, reads))
        energy = second_moment(planes_q.unsqueeze(-2), planes_q.unsqueeze(-2), moment)  # (G, reads, F, 1, 1)
        free = _equal_on_planes(weights) if normed else None
        found.append(
            Space(
                "rotary",
                planes(k, r).transpose(0, 1).unsqueeze(2),
                energy.sum(1).transpose(0, 1),
                keys,
                fixed=normed,
                free=free,
            )
        )
    if r < layout.head_dim:
        rest_q = q[:, r:].unflatten(0, (groups, reads))
        cost = second_moment(rest_q, rest_q, moment).sum(1)[None]
        rest = Space("position-free", k[None, :, r:], cost, keys)
        if normed:  # a norm's weight forbids mixing rows: each row is a space of its own, up to a sign
            rest = Space(
                "position-free",
                rest.rows[0].transpose(0, 1).unsqueeze(2),
                torch.diagonal(cost[0], dim1=-2, dim2=-1).T[:, :, None, None],
                keys,
                fixed=True,
            )
        found.append(rest)
    return found


def value_space(weights: LayerWeights, moment: Tensor | None) -> Space:
    """Values, whose errors cost what the output matrices make of them: `sum_h W_o[h]^T W_o[h]`."""
    layout = weights.layout
    o = weights.o.unflatten(0, (layout.num_key_value_heads, layout.queries_per_group))
    return Space("value", weights.v[None], (o.mT @ o).sum(1)[None], moment)


def root_mean_square(rows: Tensor, moment: Tensor | None, scope: str | None) -> Tensor:
    """Expected root-mean-square an RMSNorm divides by: (heads, 1, 1), or (1, 1, 1) for the scope "all"."""
    weighted = rows if moment is None else rows @ moment.to(rows.dtype)
    energy = (weighted * rows).sum(-1)
    mean = energy.mean(-1, keepdim=True) if scope == "head" else energy.mean().reshape(1, 1)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()[:, :, None]


def _equal_on_planes(weights: LayerWeights) -> Tensor:
    """Planes on which every norm weight is the same for both rows: there a rotation passes through the norm."""
    half = weights.layout.rotary_dim // 2
    equal = torch.ones(half, dtype=torch.bool)
    for norm in (weights.q_norm, weights.k_norm):
        if norm is not None:
            equal &= (norm[:, :half] == norm[:, half : 2 * half]).all(0)
    return equal


@dataclass(frozen=True)
class _Blend:
    """All groups of one space: shared (batch, groups, n, inputs), maps (batch, G, n, n) in group order."""

    shared: Tensor
    maps: Tensor
    lost: float
    total: float


def _blend(space: Space, groups: Sequence[Sequence[int]], method: str) -> _Blend:
    shared, maps, lost, total = [], [], 0.0, 0.0
    balanced = space.balanced
    for group in groups:
        members, cost = space.rows[:, group], space.costs[:, group]
        if space.fixed and method in ("optimal", "aligned"):
            weight = balanced[:, group] if method == "optimal" else torch.ones_like(cost)
            found = phased(members, weight, space.moment, space.free)
        else:
            found = METHODS[method](members, balanced[:, group], space.moment)
        lost += _cost(members - found[1] @ found[0].unsqueeze(-3), cost, space.moment)
        total += _cost(members, cost, space.moment)
        shared.append(found[0])
        maps.append(found[1])
    return _Blend(torch.stack(shared, 1), torch.cat(maps, 1), lost, total)


def _assemble(
    weights: LayerWeights,
    spaces: Sequence[Space],
    blended: Sequence[_Blend],
    groups: Sequence[Sequence[int]],
    moment: Tensor | None,
) -> LayerWeights:
    """The grouped layer: shared rows as keys and values, maps absorbed by queries and outputs."""
    layout, r = weights.layout, weights.layout.rotary_dim
    reads = layout.queries_per_group
    order = torch.tensor([j for group in groups for j in group])
    queries = (order[:, None] * reads + torch.arange(reads)).flatten()
    q, o = weights.q[queries].clone(), weights.o[queries]
    k = torch.empty(len(groups), *weights.k.shape[1:], dtype=weights.k.dtype, device=weights.k.device)
    v = weights.v
    for space, blend in zip(spaces, blended, strict=True):
        maps = blend.maps.repeat_interleave(reads, 1)
        if space.kind == "rotary":
            k[:, :r] = rows(blend.shared.squeeze(2).transpose(0, 1))
            q[:, :r] = rows(maps[:, :, 0].conj().transpose(0, 1) * planes(q, r))
        elif space.kind == "value":
            v, o = blend.shared[0], o @ maps[0]
        elif space.fixed:
            k[:, r:] = blend.shared.squeeze(2).transpose(0, 1)
            q[:, r:] = maps[:, :, 0].transpose(0, 1) * q[:, r:]
        else:
            k[:, r:], q[:, r:] = blend.shared[0], maps[0].mT @ q[:, r:]

    q_norm = None if weights.q_norm is None else weights.q_norm[queries]
    k_norm = None if weights.k_norm is None else weights.k_norm[: len(groups)]
    if weights.k_norm is not None and weights.norm_scope == "all":
        # The members' weights were folded into the rows. Their root-mean-square comes out again, so that the norm
        # sees rows as it did before, and makes up for what the mean lost in size.
        size = len(groups[0])
        k_norm = weights.k_norm[order].unflatten(0, (-1, size)).square().mean(1).sqrt()
        k = k / k_norm.clamp_min(torch.finfo(k.dtype).tiny)[:, :, None]
        k_norm = k_norm * root_mean_square(k, moment, "all")[0]
    return replace(
        weights, layout=layout.with_groups(len(groups)), q=q, k=k, v=v, o=o, q_norm=q_norm, k_norm=k_norm
    )


def _relative_error(blends: Sequence[_Blend]) -> float:
    total = sum(b.total for b in blends)
    return sum(b.lost for b in blends) / total if total else 0.0


def _cost(error: Tensor, costs: Tensor, moment: Tensor | None) -> float:
    return float((costs * second_moment(error, error, moment).mT).sum().real)
