"""Fewer (or more) key-value heads for one attention layer: mathematics, sections 1 to 3.

A group of g key-value heads becomes one. The published baselines pool: the group's key and value rows are
averaged, or one member's are taken, and queries and outputs stay as they are. The other methods answer which rows
the group should share, and by which map each member's row comes back from them,

    rows_j  ~  maps_j @ shared.

The maps then disappear into the queries (`q <- maps^H q`) or into the output matrix (`o <- o maps`), so the
converted layer is an ordinary grouped layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.convert.gqa.grouping import choose_groups, components
from headwise.convert.gqa.methods import METHODS, lost, phased
from headwise.convert.gqa.subspace import Space, all_spaces, root_mean_square, row_energies, see
from headwise.models.layout import LayerWeights, planes, rows

# Methods that pool the checkpoint's own rows.
POOLS = ("mean", "first", "random")


@dataclass(frozen=True)
class MergeReport:
    """What merging a layer is expected to cost.

    `key_error` is the expected squared error of the attention scores and `value_error` that of the layer's
    output for given attention weights, each relative to the energy of what is approximated (0: exact; None: a
    pooling without calibration, which measures nothing). `groups` lists the source key-value heads that each new
    head stands for.
    """

    groups: tuple[tuple[int, ...], ...]
    key_error: float | None
    value_error: float | None


def merge(
    weights: LayerWeights,
    num_key_value_heads: int,
    *,
    method: str = "optimal",
    grouping: str = "optimal",
    moment: Tensor | None = None,
    value_moment: Tensor | None = None,
    seed: int = 0,
) -> tuple[LayerWeights, MergeReport]:
    """The layer with another number of key-value heads.

    More heads are exact replicas. The same number returns the layer untouched. Fewer are merged.

    Args:
        weights: the source layer, float64.
        num_key_value_heads: a divisor of the layer's own number, or a multiple that divides its query heads.
        method: one of `methods.METHODS` or `POOLS`.
        grouping: "optimal" chooses which heads share by least residual energy, "contiguous" takes neighbours.
        moment: E[x x^T] of the attention input, (inputs, inputs), with the constant 1 appended where the layer
            has biases; None stands for the identity.
        value_moment: the same of inputs averaged by the layer's attention, which is what values are read
            through. None stands for `moment`.
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
    regroup = grouping == "optimal" and num_key_value_heads > 1
    groups = neighbours(source, size)
    spaces: list[Space] = []
    if regroup or moment is not None or method not in POOLS:
        spaces = all_spaces(weights, moment, value_moment)
    if regroup:
        groups = choose_groups([space.energy(components(source, size)) for space in spaces], size)
    named = tuple(map(tuple, groups))
    if method not in POOLS:
        merged, errors = _merge(weights, spaces, groups, method, moment)
        return merged, MergeReport(named, *errors)
    pooled = _pool_layer(weights, groups, method, seed)
    if moment is None:
        return pooled, MergeReport(named, None, None)
    after = all_spaces(pooled, moment, value_moment)
    return pooled, MergeReport(named, *_pooling_errors(spaces, after, groups))


def neighbours(heads: int, size: int) -> list[list[int]]:
    """Groups of heads that follow one another."""
    return [list(range(j, j + size)) for j in range(0, heads, size)]


def pool(heads: Tensor, groups: Sequence[Sequence[int]], method: str, seed: int = 0) -> Tensor:
    """One head for every group: the mean of its members (Ainslie et al. 2023, arXiv 2305.13245), the first or any.

    Args:
        heads: (G, ...), a layer's key rows, value rows, biases or norm weights, in any floating dtype.
        method: one of `POOLS`.

    Returns:
        (groups, ...), float64.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(groups[0]), (len(groups),), generator=generator, device="cpu").tolist()
        return heads[[group[pick] for group, pick in zip(groups, picks, strict=True)]].to(torch.float64)
    if method == "first":
        return heads[[group[0] for group in groups]].to(torch.float64)
    found = torch.zeros(len(groups), *heads.shape[1:], dtype=torch.float64, device=heads.device)
    for mean, group in zip(found, groups, strict=True):
        for j in group:
            mean += heads[j]
    return found.div_(len(groups[0]))


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


def _pool_layer(weights: LayerWeights, groups: Sequence[Sequence[int]], method: str, seed: int) -> LayerWeights:
    """The layer with pooled keys and values, and every query head beside the key-value head it reads."""
    queries = _queries(groups, weights.layout.queries_per_group)
    moved = queries != list(range(len(queries)))
    k_norm = weights.k_norm
    if k_norm is not None:
        k_norm = pool(k_norm, groups, method, seed) if weights.norm_scope == "all" else k_norm[: len(groups)]
    return replace(
        weights,
        layout=weights.layout.with_groups(len(groups)),
        q=weights.q[queries] if moved else weights.q,
        k=pool(weights.k, groups, method, seed),
        v=pool(weights.v, groups, method, seed),
        o=weights.o[queries] if moved else weights.o,
        q_norm=weights.q_norm[queries] if moved and weights.q_norm is not None else weights.q_norm,
        k_norm=k_norm,
    )


def _pooling_errors(
    before: Sequence[Space], after: Sequence[Space], groups: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """The relative errors of keys and values in which every head reads its group's rows as its own."""
    order, size = [j for group in groups for j in group], len(groups[0])
    errors = _Errors()
    for old, new in zip(before, after, strict=True):
        rows, seen = (
            a[:, order] - b.repeat_interleave(size, 1) for a, b in ((old.rows, new.rows), (old.seen, new.seen))
        )
        apart = (old.costs[:, order] * (rows @ seen.mH).mT).sum().real
        errors.add(old, float(apart))
    return errors.relative


class _Errors:
    """Expected costs of errors in keys and in values, and of losing them altogether."""

    def __init__(self) -> None:
        self._lost, self._total = [0.0, 0.0], [0.0, 0.0]

    def add(self, space: Space, lost: float) -> None:
        side = int(space.kind == "value")
        self._lost[side] += lost
        self._total[side] += float((space.costs * space.own.mT).sum().real)

    @property
    def relative(self) -> tuple[float, float]:
        keys, values = (a / b if b else 0.0 for a, b in zip(self._lost, self._total, strict=True))
        return keys, values


def _merge(
    weights: LayerWeights,
    spaces: Sequence[Space],
    groups: Sequence[Sequence[int]],
    method: str,
    moment: Tensor | None,
) -> tuple[LayerWeights, tuple[float, float]]:
    """The grouped layer: shared rows as keys and values, maps absorbed by queries and outputs.

    Group by group, so that what is in memory besides the layer and the result stays small.
    """
    layout, r = weights.layout, weights.layout.rotary_dim
    reads = layout.queries_per_group
    q, o = torch.empty_like(weights.q), torch.empty_like(weights.o)
    k = weights.k.new_empty(len(groups), *weights.k.shape[1:])
    v = weights.v.new_empty(len(groups), *weights.v.shape[1:])
    errors = _Errors()
    for space in spaces:
        forgone = 0.0
        for new, group in enumerate(groups):
            gram, costs = space.gram(group), space.costs[:, group]
            mix, maps = _mix(space, group, gram, method)
            forgone += float(lost(gram, costs, mix, maps))
            shared = mix.flatten(-2, -1) @ space.rows[:, group].flatten(1, 2)
            maps = maps.repeat_interleave(reads, 1)
            old = _queries([group], reads)
            at = slice(new * len(old), (new + 1) * len(old))
            if space.kind == "rotary":
                k[new, :r] = rows(shared[:, 0])
                q[at, :r] = rows(maps[:, :, 0].conj().transpose(0, 1) * planes(weights.q[old], r))
            elif space.kind == "value":
                v[new] = shared[0]
                torch.matmul(weights.o[old], maps[0], out=o[at])
            elif space.fixed:
                k[new, r:] = shared[:, 0]
                q[at, r:] = maps[:, :, 0].transpose(0, 1) * weights.q[old][:, r:]
            else:
                k[new, r:], q[at, r:] = shared[0], maps[0].mT @ weights.q[old][:, r:]
        errors.add(space, forgone)

    queries = _queries(groups, reads)
    q_norm = None if weights.q_norm is None else weights.q_norm[queries]
    k_norm = None if weights.k_norm is None else weights.k_norm[: len(groups)]
    if weights.k_norm is not None and weights.norm_scope == "all":
        # The members' weights were folded into the rows. Their root-mean-square comes out again, so that the norm
        # sees rows as it did before, and makes up for what the mean lost in size.
        k_norm = torch.stack([weights.k_norm[group].square().mean(0).sqrt() for group in groups])
        k = k / k_norm.clamp_min(torch.finfo(k.dtype).tiny)[:, :, None]
        k_norm = k_norm * root_mean_square(row_energies(k, see(k, moment)), "all")
    merged = replace(
        weights, layout=layout.with_groups(len(groups)), q=q, k=k, v=v, o=o, q_norm=q_norm, k_norm=k_norm
    )
    return merged, errors.relative


def _mix(space: Space, group: Sequence[int], gram: Tensor, method: str) -> tuple[Tensor, Tensor]:
    weight = space.balanced[:, group]
    if space.fixed:
        return phased(gram, weight if method == "optimal" else torch.ones_like(weight))
    return METHODS[method](gram, weight)


def _queries(groups: Sequence[Sequence[int]], reads: int) -> list[int]:
    """The query heads that read the members of these groups, in their order."""
    return [j * reads + i for group in groups for j in group for i in range(reads)]
