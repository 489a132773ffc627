"""The closed form of the optimal merge: least cost of all methods, and first-order optimality."""

from __future__ import annotations

import pytest
import torch

from headwise import registry
from headwise.convert.gqa.methods import expected_cost, optimal
from headwise.convert.gqa.subspace import MergeSubspace, key_subspaces, value_subspace
from tests.convert.gqa.samples import SHAPES, inputs_like, moment_of
from tests.reference import random_layer

METHODS = {m.name: m.load() for m in registry.METHODS if m.kind == "merge" and "moments" in m.needs}


def cost(subspace: MergeSubspace, moment: torch.Tensor | None, found: tuple) -> torch.Tensor:
    """The balanced cost of sharing `mix` of a subspace's rows, from the errors themselves."""
    mix, maps = found
    shared = torch.einsum("bagc,bgci->bai", mix, subspace.rows)
    error = subspace.rows - maps @ shared.unsqueeze(-3)
    weighted = error if moment is None else error @ moment.to(error.dtype)
    return (subspace.balanced_cost * (weighted @ error.mH).mT).sum().real


def pooling(subspace: MergeSubspace, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean of the members with these shares, as a mix and maps."""
    batch, heads, n = subspace.rows.shape[:3]
    one = torch.eye(n, dtype=subspace.rows.dtype)
    mix = shares.to(one.dtype)[None, None, :, None] * one[None, :, None, :]
    return mix.expand(batch, n, heads, n), one.expand(batch, heads, n, n)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_optimal_costs_the_least(shape, calibrated):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias)
    moment = moment_of(layer, inputs_like(layer, 400)) if calibrated else None
    for subspace in [*key_subspaces(layer, moment), value_subspace(layer, moment)]:
        gram = subspace.gram(range(groups))
        found = {n: m(gram, subspace.balanced_cost) for n, m in METHODS.items()}
        found["mean"] = pooling(subspace, torch.full((groups,), 1 / groups))
        found |= {f"head {j}": pooling(subspace, torch.eye(groups)[j]) for j in range(groups)}
        costs = {n: float(cost(subspace, moment, f)) for n, f in found.items()}
        assert costs["optimal"] == pytest.approx(
            float(expected_cost(gram, subspace.balanced_cost, *found["optimal"])), rel=1e-9
        )
        assert all(costs["optimal"] <= c * (1 + 1e-9) for c in costs.values()), costs


def test_optimal_cannot_be_improved_by_small_steps():
    """First-order optimality of the closed form: no direction of change in the shared rows lowers the cost."""
    layer = random_layer(6, 6, 8, 24)
    moment = moment_of(layer, inputs_like(layer, 200))
    for subspace in [*key_subspaces(layer, moment), value_subspace(layer, moment)]:
        mix, maps = optimal(subspace.gram(range(6)), subspace.balanced_cost)
        mix, maps = mix.detach().requires_grad_(), maps.detach().requires_grad_()
        total = cost(subspace, moment, (mix, maps))
        for gradient, value in zip(torch.autograd.grad(total, (mix, maps)), (mix, maps), strict=True):
            assert gradient.norm() * value.norm() < 1e-6 * total


def test_rows_of_zeros_merge_to_zeros() -> None:
    gram, costs = (
        torch.zeros(2, 3, 4, 3, 4, dtype=torch.float64),
        torch.eye(4, dtype=torch.float64).expand(2, 3, 4, 4),
    )
    mix, maps = optimal(gram, costs)
    assert mix.shape == (2, 4, 3, 4)
    assert mix.isfinite().all() and maps.isfinite().all()
