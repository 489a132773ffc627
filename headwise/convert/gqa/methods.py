"""The ways to make one head out of several: pure functions of small matrices, mathematics section 2.

Shared rows are always a mixture of the members' rows, and which one depends on the members only through their
second moments. A method takes those, `gram` (..., g, n, g, n): E[(row_a of member i)(row_b of member j)^H], and
the cost of errors, `costs` (..., g, n, n): an error e in member j costs `e^H costs_j e`. It returns

- `mix` (..., n, g, n), which makes the shared rows: `shared = sum_j mix[:, j] @ rows_j`;
- `maps` (..., g, n, n), which bring each member back: `rows_j ~ maps_j @ shared`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Directions whose energy is below this share of the largest are treated as absent (pseudo-inverse).
TOLERANCE = 1e-12

# Eigenvalue problems up to this order are solved by one thread, and whole even where few vectors are asked for.
SMALL = 1024
# Of larger ones, few vectors are found by this many rounds on a subspace this much wider.
ROUNDS, WIDER = 6, 1.25

Method = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def optimal(gram: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """The merge of least expected cost: top eigenvectors of the weighted members' second moment.

    With costs `R^H R`, stack `R_j rows_j`, keep the n leading principal components U of the stack, share
    `U^H stack` and return through `R_j^+ U_j` (mathematics, section 2). No inverse of the moment is taken.
    """
    g, n = gram.shape[-2:]
    weight, inverse = root(costs)
    values, vectors = leading(weigh(gram, weight).flatten(-2, -1).flatten(-3, -2), n)
    u = _canonical(vectors).unflatten(-2, (g, n))  # (..., g, n, n)
    mix, maps = u.mH @ weight, inverse @ u
    # The pair is free up to a scale: give the shared rows the members' mean size, which trains and rounds best.
    size = values.sum(-1).clamp_min(1e-300).sqrt()
    scale = _energies(gram).clamp_min(0).mean(-1).sqrt() / size
    return (mix * scale[..., None, None, None]).transpose(-3, -2), maps / scale[..., None, None, None]


def aligned(gram: Tensor, costs: Tensor, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Generalised Procrustes: turn every member by a unitary map onto the mean, then average (Jin et al. 2024).

    In a rotary plane the unitary map is a phase. The mean is rescaled to the members' mean norm. `costs` is
    not used: the method compares heads, not what they cost.
    """
    g, n = gram.shape[-2:]
    whole = gram.flatten(-2, -1).flatten(-3, -2)
    turn = torch.eye(n, dtype=gram.dtype, device=gram.device).expand(*gram.shape[:-4], g, n, n)
    mix = torch.zeros_like(whole[..., :n, :])
    mix[..., :n] = turn[..., 0, :, :]
    for _ in range(rounds):
        left, _, right = torch.linalg.svd((mix @ whole).unflatten(-1, (g, n)).transpose(-3, -2))
        turn = left @ right
        mix = turn.transpose(-3, -2).flatten(-2, -1) / g
    size = torch.einsum("...ij,...ji->...", mix @ whole, mix.mH).real.clamp_min(1e-300).sqrt()
    scale = _energies(gram).clamp_min(0).sqrt().mean(-1) / size
    return (mix * scale[..., None, None]).unflatten(-1, (g, n)), turn.mH


def phased(gram: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """The cost-weighted mean of members, each after the sign (the phase, of a complex `gram`) that fits best.

    All that a query-key norm permits: its weight forbids mixing rows, and it undoes any scale. One row per member.
    """
    g = gram.shape[-2]
    cost = costs.real.clamp_min(0).flatten(-3)  # (..., g)
    weighted = cost.sqrt()[..., :, None] * gram.reshape(*cost.shape, g) * cost.sqrt()[..., None, :]
    phase = torch.sgn(_canonical(solve(torch.linalg.eigh, weighted)[1][..., -1:]))[..., 0]
    phase = torch.where(phase == 0, torch.ones_like(phase), phase)
    share = cost / cost.sum(-1, keepdim=True).clamp_min(1e-300)
    return (share * phase.conj())[..., None, :, None], phase[..., None, None]


def lost(gram: Tensor, costs: Tensor, mix: Tensor, maps: Tensor) -> Tensor:
    """Expected cost of putting `maps_j @ shared` in the place of every member's rows, summed over all."""
    g, n = gram.shape[-2:]
    error = -maps @ mix.flatten(-2, -1).unsqueeze(-3)  # (..., g, n, g n): what is wrong, by the members' rows
    for j in range(g):
        error[..., j, :, j * n : (j + 1) * n].diagonal(dim1=-2, dim2=-1).add_(1)
    moment = error @ gram.flatten(-2, -1).flatten(-3, -2).unsqueeze(-3) @ error.mH
    return (costs * moment.mT).sum().real


def weigh(gram: Tensor, weight: Tensor) -> Tensor:
    """Second moments of `weight_j @ rows_j`, from those of the rows."""
    left = weight.unsqueeze(-3) @ gram.transpose(-3, -2)  # (..., g, g, n, n)
    return (left @ weight.mH.unsqueeze(-4)).transpose(-3, -2)


def root(costs: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^H R = costs, and its pseudo-inverse; (..., n, n) each."""
    values, vectors = solve(torch.linalg.eigh, costs)
    values = values.clamp_min(0)
    present = values > TOLERANCE * values.amax(-1, keepdim=True)
    scale = values.sqrt() * present
    inverse = torch.where(present, 1 / scale, 0.0)
    return scale[..., None] * vectors.mH, vectors * inverse[..., None, :]


def solve(problem: Callable[[Tensor], Any], matrices: Tensor) -> Any:
    """A problem of `torch.linalg`, of small matrices by one thread.

    LAPACK meets at a barrier thousands of times in one small problem, and its threads spin at each: beside other
    work, a problem of order 512 took a hundred times as long on two threads as on one.
    """
    threads = torch.get_num_threads()
    if matrices.shape[-1] <= SMALL:
        torch.set_num_threads(1)
    try:
        return problem(matrices)
    finally:
        torch.set_num_threads(threads)


def leading(matrix: Tensor, count: int, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (..., count), falling, and eigenvectors (..., n, count) of a moment.

    Large problems of which a small part is wanted are solved by subspace iteration (Halko, Martinsson, Tropp 2011,
    arXiv 0909.4061, algorithm 4.4): a decomposition of order 8192 takes minutes.

    Args:
        matrix: (..., n, n), Hermitian and positive semidefinite; or, with `right`, one factor of it, (..., n, m).
        right: (..., m, n) the other factor, `matrix @ right` being the moment.
    """
    order = matrix.shape[-2]
    if order <= SMALL or 4 * count > order:
        values, vectors = solve(torch.linalg.eigh, matrix if right is None else matrix @ right)
        return values[..., -count:].flip(-1), vectors[..., -count:].flip(-1)

    def times(vectors: Tensor) -> Tensor:
        return matrix @ (vectors if right is None else right @ vectors)

    generator = torch.Generator().manual_seed(0)
    # Drawn on the CPU, so that every device starts from the same numbers.
    start = torch.randn(order, int(WIDER * count), generator=generator, dtype=torch.float64, device="cpu")
    basis = start.to(matrix).expand(*matrix.shape[:-2], -1, -1)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(times(basis))[0]
    values, vectors = torch.linalg.eigh(basis.mH @ times(basis))
    return values[..., -count:].flip(-1), basis @ vectors[..., -count:].flip(-1)


def _energies(gram: Tensor) -> Tensor:
    """E|rows_j x|^2 of every member, (..., g)."""
    return torch.einsum("...jaja->...j", gram).real


def _canonical(vectors: Tensor) -> Tensor:
    """Eigenvectors with the phase fixed by their largest entry, so that equal inputs give equal bytes."""
    index = vectors.abs().argmax(-2, keepdim=True)
    phase = torch.sgn(vectors.gather(-2, index))
    return vectors * torch.where(phase == 0, torch.ones_like(phase), phase).conj()


METHODS: dict[str, Method] = {"optimal": optimal, "aligned": aligned}
