"""Choose which KV heads share: a partition of the heads into equal groups (mathematics, sections 2 and 6).

A grouping method is a pure function `(num_heads, group_size, energies) -> groups`, named in the registry. Query
heads may be permuted freely, so the choice costs nothing at run time. Before an optimal merge it halves the damage
at four heads to one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.convert.linalg import eigenvalues

# The largest order of the eigenvalue problem that gives the cost of a candidate group. With many heads there are
# thousands of candidates.
MAX_ORDER, MAX_ORDER_MANY_HEADS = 128, 64
MANY_HEADS = 16


def num_components(num_heads: int, group_size: int) -> int:
    """Return how many leading principal components stand for a head when groups are compared.

    Args:
        num_heads: KV heads of the layer.
        group_size: heads per group.
    """
    return max(8, (MAX_ORDER if num_heads <= MANY_HEADS else MAX_ORDER_MANY_HEADS) // group_size)


def contiguous_groups(num_heads: int, group_size: int, energies: Sequence[Tensor] = ()) -> list[list[int]]:
    """Group heads that follow one another.

    Args:
        num_heads: KV heads of the layer.
        group_size: heads per group; divides `num_heads`.
        energies: not used.

    Returns:
        Groups of ascending heads, ordered by their first head.
    """
    return [list(range(j, j + group_size)) for j in range(0, num_heads, group_size)]


def optimal_groups(num_heads: int, group_size: int, energies: Sequence[Tensor]) -> list[list[int]]:
    """Search the groups with the least residual energy.

    The search starts from the better of contiguous groups and greedy growth, and swaps two heads while a swap
    lowers the cost.

    Args:
        num_heads: KV heads of the layer, G.
        group_size: heads per group; divides G.
        energies: per subspace, E[(R_i row_i)(R_j row_j)^H] as (batch, G, n, G, n), of `num_components` rows per
            head or of all. Each subspace counts relative to its own total energy.

    Returns:
        Groups of ascending heads, ordered by their first head.
    """
    cost = GroupCost(energies)
    contiguous = [tuple(group) for group in contiguous_groups(num_heads, group_size)]
    candidates = (_grow(num_heads, group_size, cost), contiguous)
    start = min(candidates, key=lambda groups: sum(cost(group) for group in groups))
    return [list(group) for group in _descend(start, cost)]


class GroupCost:
    """Residual energy of candidate groups, summed over subspaces, each relative to its total; results are cached.

    Args:
        energies: as for `optimal_groups`.
    """

    def __init__(self, energies: Sequence[Tensor]) -> None:
        # Ordered so that a candidate's block is gathered in one piece.
        self._energies = [energy.permute(1, 3, 0, 2, 4).contiguous() for energy in energies]
        self._totals = [float(torch.einsum("bhnhn->", energy).real) or 1.0 for energy in energies]
        self._costs: dict[tuple[int, ...], float] = {}

    def __call__(self, group: Sequence[int]) -> float:
        """Return the residual energy of one group."""
        key = tuple(sorted(group))
        if key not in self._costs:
            self.evaluate([key])
        return self._costs[key]

    def evaluate(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Compute the residual energies of many groups in one batch, and cache them.

        Args:
            groups: groups of one size.
        """
        new = sorted({tuple(sorted(g)) for g in groups} - self._costs.keys())
        if not new:
            return
        device = self._energies[0].device
        index = torch.tensor(new, device=device)
        residual = torch.zeros(len(new), dtype=torch.float64, device=device)
        for energy, total in zip(self._energies, self._totals, strict=True):
            n = energy.shape[-1]
            block = energy[index[:, :, None], index[:, None, :]]  # (groups, g, g, batch, n, n)
            block = block.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (groups, batch, g n, g n)
            residual += eigenvalues(block)[..., :-n].sum((-1, -2)).to(torch.float64) / total
        self._costs.update(zip(new, residual.tolist(), strict=True))


def _grow(num_heads: int, group_size: int, cost: GroupCost) -> list[tuple[int, ...]]:
    """Fill one group after the other, each time with the head that costs least."""
    left, groups = set(range(num_heads)), []
    while left:
        group: tuple[int, ...] = (min(left),)
        while len(group) < group_size:
            candidates = [tuple(sorted((*group, j))) for j in sorted(left - set(group))]
            cost.evaluate(candidates)
            group = min(candidates, key=lambda g: (cost(g), g))
        groups.append(group)
        left -= set(group)
    return groups


def _descend(groups: Sequence[tuple[int, ...]], cost: GroupCost) -> list[tuple[int, ...]]:
    """Swap heads between pairs of groups while that lowers the cost."""
    current = [tuple(sorted(g)) for g in groups]
    stale = set(itertools.combinations(range(len(current)), 2))
    while stale:
        options = {pair: _swaps(current[pair[0]], current[pair[1]]) for pair in sorted(stale)}
        cost.evaluate([g for swaps in options.values() for both in swaps for g in both])
        improving = []
        for (i, j), swaps in options.items():
            now = cost(current[i]) + cost(current[j])
            gain, a, b = min((cost(a) + cost(b) - now, a, b) for a, b in swaps)
            if gain < -1e-12:
                improving.append((gain, (i, j), a, b))
        # Apply every improvement of groups that did not change in this round; only their pairs are tried again.
        changed: set[int] = set()
        for _, (i, j), a, b in sorted(improving):
            if i not in changed and j not in changed:
                current[i], current[j] = a, b
                changed |= {i, j}
        stale = {p for p in itertools.combinations(range(len(current)), 2) if changed & set(p)}
    return sorted(current)


def _swaps(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return what two groups become by every swap of two heads."""
    return [(tuple(sorted({*a, y} - {x})), tuple(sorted({*b, x} - {y}))) for x in a for y in b]
