"""The search for groups: never worse than contiguous groups, and no swap is better."""

from __future__ import annotations

import itertools

import pytest

from headwise.convert.gqa.grouping import GroupCost, contiguous_groups, optimal_groups
from headwise.convert.gqa.subspace import key_subspaces, value_subspace
from tests.reference import random_layer


@pytest.mark.parametrize("groups, target", [(8, 4), (8, 2), (9, 3), (14, 7), (12, 4)])
def test_optimal_groups_are_never_worse_than_contiguous_ones(groups, target):
    layer = random_layer(groups, groups, 8, 40, seed=groups)
    energies = [s.energy() for s in [*key_subspaces(layer, None), value_subspace(layer, None)]]
    size = groups // target
    value = GroupCost(energies)
    chosen = optimal_groups(groups, size, energies)
    assert sorted(j for group in chosen for j in group) == list(range(groups))
    assert sum(map(value, chosen)) <= sum(map(value, contiguous_groups(groups, size))) * (1 + 1e-12)
    # No partition that differs by one swap is better.
    for a, b in itertools.combinations(chosen, 2):
        for x, y in itertools.product(a, b):
            swapped = value([y, *(j for j in a if j != x)]) + value([x, *(j for j in b if j != y)])
            assert value(a) + value(b) <= swapped + 1e-9
