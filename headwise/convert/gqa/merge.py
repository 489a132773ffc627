"""Change the number of KV heads of one attention layer: mathematics, sections 1 to 3.

A group of g KV heads becomes one. The pooling methods take one member's key and value rows or average them, and
leave queries and outputs as they are. The other methods find the rows that the group shares and the maps that bring
each member's rows back from them,

    rows_j  ~  maps_j @ shared.

The maps are then absorbed by the queries (`q <- maps^H q`) or by the output matrix (`o <- o maps`), so the
converted layer is an ordinary grouped layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise import registry
from headwise.convert.gqa.grouping import num_components
from headwise.convert.gqa.methods import MergeMethod, expected_cost
from headwise.convert.gqa.pooling import PoolingMethod
from headwise.convert.gqa.subspace import (
    MergeSubspace,
    expected_rms,
    merge_subspaces,
    row_energies,
    times_moment,
)
from headwise.models.layout import LayerWeights, from_planes, to_planes


@dataclass(frozen=True)
class MergeReport:
    """The expected error of a merged layer.

    Attributes:
        groups: the source KV heads that each new head replaces.
        key_error: expected squared error of the attention scores, relative to their energy. 0: exact; None: a
            pooling without calibration, which measures nothing.
        value_error: the same of the layer's output, for given attention weights.
    """

    groups: tuple[tuple[int, ...], ...]
    key_error: float | None
    value_error: float | None


def merge_heads(
    weights: LayerWeights,
    num_key_value_heads: int,
    *,
    method: str = "optimal",
    grouping: str = "optimal",
    moment: Tensor | None = None,
    value_moment: Tensor | None = None,
    states_moment: Tensor | None = None,
    seed: int = 0,
) -> tuple[LayerWeights, MergeReport]:
    """Return the layer with another number of KV heads.

    More heads are exact replicas. The same number returns the layer unchanged. Fewer are merged.

    Args:
        weights: the source layer, float64.
        num_key_value_heads: a divisor of the layer's own number, or a multiple of it that divides its query heads.
        method: the name of a merge method in the registry.
        grouping: the name of a grouping method in the registry.
        moment: (inputs, inputs) E[x x^T] of the attention input, with the constant 1 appended where the layer has
            biases; None stands for the identity.
        value_moment: the same of inputs averaged by the layer's attention, which the values multiply. None stands
            for `states_moment`.
        states_moment: the same of the encoder's output, which the keys and values of cross-attention are made from;
            None stands for `moment`.
        seed: for methods that draw random numbers.

    Returns:
        The converted layer, float64, and its expected error.

    Raises:
        ValueError: the layer's heads cannot become this many.
        SettingError: there is no method or grouping of that name.
    """
    source, heads = weights.layout.num_key_value_heads, weights.layout.num_attention_heads
    each = tuple((j,) for j in range(source))
    if num_key_value_heads == source:
        return weights, MergeReport(each, 0.0, 0.0)
    if num_key_value_heads > source:
        if num_key_value_heads % source or heads % num_key_value_heads:
            raise ValueError(
                f"{source} KV heads of {heads} query heads cannot be repeated to {num_key_value_heads}: give a "
                f"multiple of {source} that divides {heads}"
            )
        return replicate_heads(weights, num_key_value_heads // source), MergeReport(each, 0.0, 0.0)
    if num_key_value_heads < 1 or source % num_key_value_heads:
        raise ValueError(
            f"{source} KV heads cannot be merged into {num_key_value_heads}: give a divisor of {source}"
        )

    how, partition = (
        registry.find_method("merge", method),
        registry.find_method("grouping", grouping, field="grouping"),
    )
    pooled, searched = "moments" not in how.needs, bool(partition.needs) and num_key_value_heads > 1
    size = source // num_key_value_heads
    before: list[MergeSubspace] = []
    if searched or moment is not None or not pooled:
        before = merge_subspaces(weights, moment, value_moment, states_moment)
    energies = [subspace.energy(num_components(source, size)) for subspace in before] if searched else []
    groups: list[list[int]] = [list(range(source))]
    if num_key_value_heads > 1:
        groups = partition.load()(source, size, energies)
    del energies
    members = tuple(map(tuple, groups))
    if not pooled:
        merged, errors = _merge(
            weights, before, groups, how.load(), moment if states_moment is None else states_moment
        )
        return merged, MergeReport(members, *errors)
    layer = _pool_layer(weights, groups, how.load(), seed)
    if moment is None:
        return layer, MergeReport(members, None, None)
    after = merge_subspaces(layer, moment, value_moment, states_moment)
    return layer, MergeReport(members, *_pooling_errors(before, after, groups))


def replicate_heads(weights: LayerWeights, times: int) -> LayerWeights:
    """Repeat every KV head: the same function, bit for bit (mathematics, section 3).

    Args:
        weights: the source layer.
        times: the number of replicas of each head, the head itself included.
    """
    layout = weights.layout.with_groups(weights.layout.num_key_value_heads * times)
    k_norm = None if weights.k_norm is None else weights.k_norm.repeat_interleave(times, 0)
    return replace(
        weights,
        layout=layout,
        k=weights.k.repeat_interleave(times, 0),
        v=weights.v.repeat_interleave(times, 0),
        k_norm=k_norm,
    )


def _pool_layer(
    weights: LayerWeights, groups: Sequence[Sequence[int]], pool: PoolingMethod, seed: int
) -> LayerWeights:
    """Return the layer with pooled keys and values, and its query heads in the order of their groups."""
    weights = weights.with_query_heads(_query_heads(groups, weights.layout.queries_per_group))
    k_norm = weights.k_norm
    if k_norm is not None:
        k_norm = pool(k_norm, groups, seed) if weights.norm_scope == "all" else k_norm[: len(groups)]
    return replace(
        weights,
        layout=weights.layout.with_groups(len(groups)),
        k=pool(weights.k, groups, seed),
        v=pool(weights.v, groups, seed),
        k_norm=k_norm,
    )


def _pooling_errors(
    before: Sequence[MergeSubspace], after: Sequence[MergeSubspace], groups: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Return the relative errors of keys and values if every head takes its group's rows in place of its own."""
    order, size = [j for group in groups for j in group], len(groups[0])
    errors = _Errors()
    for old, new in zip(before, after, strict=True):
        difference, difference_moment = (
            a[:, order] - b.repeat_interleave(size, 1)
            for a, b in ((old.rows, new.rows), (old.rows_moment, new.rows_moment))
        )
        cost = (old.costs[:, order] * (difference @ difference_moment.mH).mT).sum().real
        errors.add(old, float(cost))
    return errors.relative


class _Errors:
    """Expected costs of errors in keys and in values, relative to the cost of replacing the rows by zero."""

    def __init__(self) -> None:
        self._cost, self._total = [0.0, 0.0], [0.0, 0.0]

    def add(self, subspace: MergeSubspace, cost: float) -> None:
        side = int(subspace.kind == "value")
        self._cost[side] += cost
        self._total[side] += subspace.total_energy

    @property
    def relative(self) -> tuple[float, float]:
        keys, values = (a / b if b else 0.0 for a, b in zip(self._cost, self._total, strict=True))
        return keys, values


def _merge(
    weights: LayerWeights,
    subspaces: Sequence[MergeSubspace],
    groups: Sequence[Sequence[int]],
    method: MergeMethod,
    moment: Tensor | None,
) -> tuple[LayerWeights, tuple[float, float]]:
    """Return the grouped layer: shared rows as keys and values, maps absorbed by queries and outputs.

    Groups are merged one at a time, so that little is in memory besides the layer and the result.
    """
    layout, r = weights.layout, weights.layout.rotary_dim
    reads = layout.queries_per_group
    q, o = torch.empty_like(weights.q), torch.empty_like(weights.o)
    k = weights.k.new_empty(len(groups), *weights.k.shape[1:])
    v = weights.v.new_empty(len(groups), *weights.v.shape[1:])
    errors = _Errors()
    for subspace in subspaces:
        cost = torch.zeros((), dtype=weights.k.dtype, device=weights.k.device)  # read once: a GPU is waited for
        for new, group in enumerate(groups):
            gram, costs = subspace.gram(group), subspace.costs[:, group]
            mix, maps = method(gram, subspace.balanced_cost[:, group], sign_only=subspace.sign_only)
            cost += expected_cost(gram, costs, mix, maps)
            shared = mix.flatten(-2, -1) @ subspace.rows[:, group].flatten(1, 2)
            maps = maps.repeat_interleave(reads, 1)
            old = _query_heads([group], reads)
            at = slice(new * len(old), (new + 1) * len(old))
            if subspace.kind == "rotary":
                k[new, :r] = from_planes(shared[:, 0])
                q[at, :r] = from_planes(maps[:, :, 0].conj().transpose(0, 1) * to_planes(weights.q[old], r))
            elif subspace.kind == "value" and weights.gate is not None:
                v[new] = shared[:, 0]
                torch.mul(weights.o[old], maps[:, :, 0, 0].T[:, None], out=o[at])
            elif subspace.kind == "value":
                v[new] = shared[0]
                torch.matmul(weights.o[old], maps[0], out=o[at])
            elif subspace.sign_only:
                k[new, r:] = shared[:, 0]
                q[at, r:] = maps[:, :, 0].transpose(0, 1) * weights.q[old][:, r:]
            else:
                k[new, r:], q[at, r:] = shared[0], maps[0].mT @ weights.q[old][:, r:]
        errors.add(subspace, float(cost))

    k_norm = None if weights.k_norm is None else weights.k_norm[: len(groups)]
    if weights.k_norm is not None and weights.norm_scope == "all":
        # The members' weights were folded into the rows. Their root-mean-square is taken out again, so that the
        # norm gets rows of the former size, and it makes up for the size that the mean lost.
        k_norm = torch.stack([weights.k_norm[group].square().mean(0).sqrt() for group in groups])
        k = k / k_norm.clamp_min(torch.finfo(k.dtype).tiny)[:, :, None]
        k_norm = k_norm * expected_rms(row_energies(k, times_moment(k, moment)), "all")
    moved = weights.with_query_heads(_query_heads(groups, reads))
    merged = replace(moved, layout=layout.with_groups(len(groups)), q=q, k=k, v=v, o=o, k_norm=k_norm)
    return merged, errors.relative


def _query_heads(groups: Sequence[Sequence[int]], reads: int) -> list[int]:
    """Return the query heads that read the members of these groups, in their order."""
    return [j * reads + i for group in groups for j in group for i in range(reads)]
