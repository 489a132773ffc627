"""Which heads should share: the partition into equal groups with the least residual energy.

Query heads may be permuted freely, so the choice costs nothing at run time and, before an optimal merge, halves
the damage at four heads to one (mathematics, sections 2 and 6).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.convert.gqa.methods import solve

# Order of the eigenvalue problem that tells what a candidate group costs, at most: with many heads there are
# thousands of candidates.
LARGEST_PROBLEM, WITH_MANY_HEADS = 128, 64
MANY_HEADS = 16


def components(heads: int, size: int) -> int:
    """How many leading principal components stand for a head when groups of `size` are compared."""
    return max(8, (LARGEST_PROBLEM if heads <= MANY_HEADS else WITH_MANY_HEADS) // size)


def choose_groups(energies: Sequence[Tensor], size: int) -> list[list[int]]:
    """Partition of the heads into groups of `size`.

    From the better of neighbours and greedy growth, swaps of two heads lower the cost until none does.

    Args:
        energies: per space, E[(R_i row_i)(R_j row_j)^H] as (batch, G, n, G, n), of as many rows as `components`
            says or of all; each space counts by its share of its own total energy.
        size: heads per group; divides G.

    Returns:
        Groups of ascending heads, ordered by their first head.
    """
    heads = energies[0].shape[1]
    cost = GroupCost(energies)
    neighbours = [tuple(range(j, j + size)) for j in range(0, heads, size)]
    start = min((_grow(heads, size, cost), neighbours), key=lambda groups: sum(cost(group) for group in groups))
    return [list(group) for group in _descend(start, cost)]


class GroupCost:
    """Residual energy of a candidate group, summed over spaces, each relative to its total. Remembers."""

    def __init__(self, energies: Sequence[Tensor]) -> None:
        # Ordered so that a candidate's block is gathered in one piece.
        self._spaces = [energy.permute(1, 3, 0, 2, 4).contiguous() for energy in energies]
        self._totals = [float(torch.einsum("bhnhn->", energy).real) or 1.0 for energy in energies]
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, group: Sequence[int]) -> float:
        key = tuple(sorted(group))
        if key not in self._known:
            self.evaluate([key])
        return self._known[key]

    def evaluate(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Work out many groups of one size at once."""
        new = sorted({tuple(sorted(g)) for g in groups} - self._known.keys())
        if not new:
            return
        device = self._spaces[0].device
        index = torch.tensor(new, device=device)
        total = torch.zeros(len(new), dtype=torch.float64, device=device)
        for energy, whole in zip(self._spaces, self._totals, strict=True):
            n = energy.shape[-1]
            block = energy[index[:, :, None], index[:, None, :]]  # (groups, g, g, batch, n, n)
            block = block.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (groups, batch, g n, g n)
            values = solve(torch.linalg.eigvalsh, block)
            total += values[..., :-n].sum((-1, -2)).to(torch.float64) / whole
        self._known.update(zip(new, total.tolist(), strict=True))


def _grow(heads: int, size: int, cost: GroupCost) -> list[tuple[int, ...]]:
    left, groups = set(range(heads)), []
    while left:
        group: tuple[int, ...] = (min(left),)
        while len(group) < size:
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
        options = {pair: _exchanges(current[pair[0]], current[pair[1]]) for pair in sorted(stale)}
        cost.evaluate([g for exchanges in options.values() for both in exchanges for g in both])
        improving = []
        for (i, j), exchanges in options.items():
            now = cost(current[i]) + cost(current[j])
            gain, a, b = min((cost(a) + cost(b) - now, a, b) for a, b in exchanges)
            if gain < -1e-12:
                improving.append((gain, (i, j), a, b))
        # Apply every improvement that touches groups not changed in this round; only those pairs need another look.
        changed: set[int] = set()
        for _, (i, j), a, b in sorted(improving):
            if i not in changed and j not in changed:
                current[i], current[j] = a, b
                changed |= {i, j}
        stale = {p for p in itertools.combinations(range(len(current)), 2) if changed & set(p)}
    return sorted(current)


def _exchanges(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(sorted({*a, y} - {x})), tuple(sorted({*b, x} - {y}))) for x in a for y in b]
