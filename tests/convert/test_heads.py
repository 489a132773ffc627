"""The laws of merging heads: what must be exact is exact, and the default is never worse than the baselines."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from headwise.convert.gqa import methods
from headwise.convert.gqa.grouping import GroupCost, choose_groups
from headwise.convert.gqa.merge import merge
from headwise.convert.gqa.methods import METHODS, lost
from headwise.convert.gqa.subspace import Space, key_spaces, value_space
from headwise.models.layout import LayerWeights, planes, rows
from tests.reference import attend, frequencies, random_layer

SHAPES = [  # heads, key-value heads, head_dim, rotary_dim, hidden size, bias
    (8, 8, 16, 16, 48, False),
    (9, 9, 8, 8, 36, True),
    (14, 14, 8, 4, 40, False),
    (28, 4, 8, 0, 32, True),
    (8, 4, 12, 6, 20, False),
]


def inputs_like(weights: LayerWeights, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(weights.hidden_size, weights.hidden_size, generator=g, dtype=torch.float64)
    return torch.randn(tokens, weights.hidden_size, generator=g, dtype=torch.float64) @ mix / mix.shape[0] ** 0.5


def moment_of(weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    if weights.has_bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    return x.mT @ x / len(x)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gauge(weights: LayerWeights, seed: int = 3) -> LayerWeights:
    """A random change of coordinates in every head that no logit can see (mathematics, section 1)."""
    g = torch.Generator().manual_seed(seed)
    layout, r = weights.layout, weights.layout.rotary_dim
    reads = layout.queries_per_group
    turn = torch.randn(layout.num_key_value_heads, r // 2, 1, generator=g, dtype=torch.complex128) + 0.1
    free = layout.head_dim - r
    m = torch.randn(layout.num_key_value_heads, free, free, generator=g, dtype=torch.float64)
    w = torch.randn(layout.num_key_value_heads, layout.v_head_dim, layout.v_head_dim, generator=g).double()
    expand = lambda t: t.repeat_interleave(reads, 0)  # noqa: E731
    return replace(
        weights,
        k=torch.cat([rows(turn * planes(weights.k, r)), m @ weights.k[:, r:]], 1),
        q=torch.cat(
            [rows(planes(weights.q, r) / expand(turn).conj()), expand(m.inverse()).mT @ weights.q[:, r:]], 1
        ),
        v=w @ weights.v,
        o=weights.o @ expand(w.inverse()),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gauge_moves_nothing(shape):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias)
    x, f = inputs_like(layer), frequencies(rotary)
    assert relative(attend(gauge(layer), x, f), attend(layer, x, f)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_number_of_groups_changes_no_bit(shape):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias)
    merged, report = merge(layer, groups)
    assert all(torch.equal(getattr(merged, n), getattr(layer, n)) for n in "qkvo")
    assert report.key_error == report.value_error == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scope", [None, "head", "all"])
def test_more_heads_are_exact(shape, scope):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias, norm_scope=scope)
    x, f = inputs_like(layer), frequencies(rotary)
    wide, _ = merge(layer, heads)
    assert wide.layout.num_key_value_heads == heads
    assert relative(attend(wide, x, f), attend(layer, x, f)) < 1e-14


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_that_differ_by_a_gauge_merge_exactly(shape, calibrated):
    """Replicas hidden behind random gauges and a shuffle: grouping must find them, merging must lose nothing."""
    heads, groups, d, rotary, hidden, bias = shape
    if heads == groups:
        layer = random_layer(heads, 1 if heads % 2 else heads // 2, d, hidden, rotary_dim=rotary, bias=bias)
    else:
        layer = random_layer(heads, groups // 2, d, hidden, rotary_dim=rotary, bias=bias)
    wide, _ = merge(layer, groups)
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(5))
    reads = wide.layout.queries_per_group
    queries = (order[:, None] * reads + torch.arange(reads)).flatten()
    hidden_replicas = gauge(replace(wide, q=wide.q[queries], k=wide.k[order], v=wide.v[order], o=wide.o[queries]))
    x, f = inputs_like(layer), frequencies(rotary)
    moment = moment_of(layer, x) if calibrated else None
    merged, report = merge(hidden_replicas, layer.layout.num_key_value_heads, moment=moment)
    assert relative(attend(merged, x, f), attend(layer, x, f)) < 1e-7
    assert report.key_error < 1e-9 and report.value_error < 1e-9


@pytest.mark.parametrize("scope", ["head", "all"])
def test_normed_heads_that_differ_by_sign_and_scale_merge_exactly(scope):
    layer = random_layer(8, 4, 8, 32, norm_scope=scope)
    g = torch.Generator().manual_seed(0)
    wide, _ = merge(layer, 8)
    sign = torch.randint(2, (8, 4), generator=g).double() * 2 - 1
    sign = torch.cat([sign, sign], 1)[:, :, None]
    scale = torch.rand(8, 1, 1, generator=g).double() + 0.5 if scope == "head" else 1.0
    wide = replace(wide, k=scale * sign * wide.k, q=sign * wide.q)
    x, f = inputs_like(layer), frequencies(8)
    assert relative(attend(wide, x, f), attend(layer, x, f)) < 1e-6
    merged, report = merge(wide, 4, moment=moment_of(layer, x))
    assert relative(attend(merged, x, f), attend(layer, x, f)) < 1e-4  # the norm's eps is not scale-free
    assert report.key_error < 1e-9


def cost(space: Space, moment: torch.Tensor | None, found: tuple) -> torch.Tensor:
    """The balanced cost of sharing `mix` of a space's rows, from the errors themselves."""
    mix, maps = found
    shared = torch.einsum("bagc,bgci->bai", mix, space.rows)
    error = space.rows - maps @ shared.unsqueeze(-3)
    weighted = error if moment is None else error @ moment.to(error.dtype)
    return (space.balanced * (weighted @ error.mH).mT).sum().real


def pooling(space: Space, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean of the members with these shares, as a mix and maps."""
    batch, heads, n = space.rows.shape[:3]
    one = torch.eye(n, dtype=space.rows.dtype)
    mix = shares.to(one.dtype)[None, None, :, None] * one[None, :, None, :]
    return mix.expand(batch, n, heads, n), one.expand(batch, heads, n, n)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_optimal_costs_the_least(shape, calibrated):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias)
    moment = moment_of(layer, inputs_like(layer, 400)) if calibrated else None
    for space in [*key_spaces(layer, moment), value_space(layer, moment)]:
        gram = space.gram(range(groups))
        found = {n: m(gram, space.balanced) for n, m in METHODS.items()}
        found["mean"] = pooling(space, torch.full((groups,), 1 / groups))
        found |= {f"head {j}": pooling(space, torch.eye(groups)[j]) for j in range(groups)}
        costs = {n: float(cost(space, moment, f)) for n, f in found.items()}
        assert costs["optimal"] == pytest.approx(float(lost(gram, space.balanced, *found["optimal"])), rel=1e-9)
        assert all(costs["optimal"] <= c * (1 + 1e-9) for c in costs.values()), costs


@pytest.mark.parametrize("groups, target", [(8, 4), (8, 2), (9, 3), (14, 7), (12, 4)])
def test_chosen_groups_are_never_worse_than_neighbours(groups, target):
    layer = random_layer(groups, groups, 8, 40, seed=groups)
    energies = [s.energy() for s in [*key_spaces(layer, None), value_space(layer, None)]]
    size = groups // target
    value = GroupCost(energies)
    chosen = choose_groups(energies, size)
    assert sorted(j for group in chosen for j in group) == list(range(groups))
    neighbours = [tuple(range(j, j + size)) for j in range(0, groups, size)]
    assert sum(map(value, chosen)) <= sum(map(value, neighbours)) * (1 + 1e-12)
    # No partition that differs by one swap is better.
    for a, b in itertools.combinations(chosen, 2):
        for x, y in itertools.product(a, b):
            swapped = value([y, *(j for j in a if j != x)]) + value([x, *(j for j in b if j != y)])
            assert value(a) + value(b) <= swapped + 1e-9


def test_the_reported_error_is_the_measured_one():
    """The report's value error, against the outputs themselves under uniform attention weights of one token."""
    layer = random_layer(8, 8, 8, 24)
    x = inputs_like(layer, 600)
    merged, report = merge(layer, 2, moment=moment_of(layer, x))
    reads = merged.layout.queries_per_group
    order = [j for group in report.groups for j in group]
    got = torch.einsum("hvi,ti,hdv->htd", merged.v.repeat_interleave(reads, 0), x, merged.o)
    want = torch.einsum("hvi,ti,hdv->htd", layer.v[order], x, layer.o[order])
    assert float((got - want).square().sum() / want.square().sum()) == pytest.approx(report.value_error, rel=1e-6)


def test_optimal_cannot_be_improved_by_small_steps():
    """First-order optimality of the closed form: no direction of change in the shared rows lowers the cost."""
    layer = random_layer(6, 6, 8, 24)
    moment = moment_of(layer, inputs_like(layer, 200))
    for space in [*key_spaces(layer, moment), value_space(layer, moment)]:
        mix, maps = METHODS["optimal"](space.gram(range(6)), space.balanced)
        mix, maps = mix.detach().requires_grad_(), maps.detach().requires_grad_()
        total = cost(space, moment, (mix, maps))
        for gradient, value in zip(torch.autograd.grad(total, (mix, maps)), (mix, maps), strict=True):
            assert gradient.norm() * value.norm() < 1e-6 * total


@pytest.mark.parametrize("bad", [0, 3, 5, 16])
def test_unreachable_head_counts_are_refused(bad):
    with pytest.raises(ValueError, match="key-value heads"):
        merge(random_layer(8, 8, 8, 24), bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_few_vectors_of_a_large_problem_are_those_of_the_whole(monkeypatch, dtype):
    factor = torch.randn(2, 96, 80, dtype=dtype, generator=torch.Generator().manual_seed(0))
    factor = factor * torch.arange(1, 81) ** -1.5
    moment = factor @ factor.mH
    values, vectors = methods.leading(moment, 4)
    monkeypatch.setattr(methods, "SMALL", 8)
    for few, found in (methods.leading(moment, 4), methods.leading(factor, 4, factor.mH)):
        torch.testing.assert_close(few, values, rtol=1e-4, atol=0)
        assert (vectors.mH @ found).abs().square().sum((-2, -1)).min() > 4 - 1e-3
