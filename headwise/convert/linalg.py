"""Linear algebra of second moments: square roots, leading eigenvectors, ridge regression (float64, batched).

A moment is a Hermitian positive semidefinite matrix `E[x x^H]`. These functions do not depend on attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Eigenvalues below this share of the largest one count as zero in a pseudo-inverse.
TOLERANCE = 1e-12
# Problems up to this order run on one thread, and are decomposed in full even where few eigenvectors are needed.
SMALL_ORDER = 1024
# Subspace iteration: the number of multiplications, and the width of the subspace per eigenvector.
NUM_ITERATIONS, OVERSAMPLING = 6, 1.25


def single_threaded_lapack(problem: Callable[[Tensor], Any], matrices: Tensor) -> Any:
    """Solve a problem of `torch.linalg`, on one thread if its matrices are small.

    LAPACK synchronises its threads thousands of times in one small problem, and waiting threads spin. With other
    work on the same cores, a problem of order 512 took a hundred times as long on two threads as on one.

    Args:
        problem: a function of the matrices, such as `torch.linalg.eigh`.
        matrices: (..., n, n).

    Returns:
        The result of `problem`.
    """
    num_threads = torch.get_num_threads()
    if matrices.shape[-1] <= SMALL_ORDER:
        torch.set_num_threads(1)
    try:
        return problem(matrices)
    finally:
        torch.set_num_threads(num_threads)


def sqrt_and_pinv(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a moment as `R^H R` and invert the factor.

    Args:
        moment: (..., n, n), Hermitian and positive semidefinite.

    Returns:
        R and its pseudo-inverse, (..., n, n) each. R is not symmetric: it is diagonal times unitary.
    """
    values, vectors = single_threaded_lapack(torch.linalg.eigh, moment)
    values = values.clamp_min(0)
    present = values > TOLERANCE * values.amax(-1, keepdim=True)
    scale = values.sqrt() * present
    inverse = torch.where(present, 1 / scale, 0.0)
    return scale[..., None] * vectors.mH, vectors * inverse[..., None, :]


def symmetric_sqrt(moment: Tensor) -> Tensor:
    """Return the Hermitian square root of a moment, (..., n, n).

    Args:
        moment: (..., n, n), Hermitian and positive semidefinite.
    """
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mH
    return root


def top_eigenpairs(matrix: Tensor, count: int, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of a moment and their eigenvectors.

    A large problem of which at most a quarter of the eigenvectors is needed is solved by subspace iteration (Halko,
    Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4). The library's own functions were measured and not
    taken. On one thread, 256 eigenvectors of order 2048 (eigenvalues 1/i) took 1.9 s here, with 2.8e-4 of the
    energy lost; `torch.svd_lowrank` took 2.0 s (5.3e-4) or 2.6 s (1.4e-4), `torch.linalg.eigh` 4.8 s and
    `torch.lobpcg` 12.6 s. `svd_lowrank` draws from the global random generator of the device, so two calls give
    different bytes. `lobpcg` refuses complex matrices. Neither takes a moment as two factors.

    Args:
        matrix: (..., n, n), Hermitian and positive semidefinite; or, with `right`, one factor of it, (..., n, m).
        count: the number of eigenpairs.
        right: (..., m, n), the other factor: the moment is `matrix @ right`.

    Returns:
        Eigenvalues (..., count), falling, and eigenvectors (..., n, count).
    """
    order = matrix.shape[-2]
    if order <= SMALL_ORDER or 4 * count > order:
        values, vectors = single_threaded_lapack(torch.linalg.eigh, matrix if right is None else matrix @ right)
        return values[..., -count:].flip(-1), vectors[..., -count:].flip(-1)

    def multiply(vectors: Tensor) -> Tensor:
        return matrix @ (vectors if right is None else right @ vectors)

    generator = torch.Generator().manual_seed(0)
    # Drawn on the CPU, so that every device starts from the same numbers.
    start = torch.randn(order, int(OVERSAMPLING * count), generator=generator, dtype=torch.float64, device="cpu")
    basis = start.to(matrix).expand(*matrix.shape[:-2], -1, -1)
    for _ in range(NUM_ITERATIONS):
        basis = torch.linalg.qr(multiply(basis))[0]
    values, vectors = torch.linalg.eigh(basis.mH @ multiply(basis))
    return values[..., -count:].flip(-1), basis @ vectors[..., -count:].flip(-1)


def fix_phase(vectors: Tensor) -> Tensor:
    """Scale each eigenvector so that its largest entry is real and positive: equal inputs then give equal bytes.

    Args:
        vectors: (..., n, count), one eigenvector per column.

    Returns:
        (..., n, count).
    """
    index = vectors.abs().argmax(-2, keepdim=True)
    phase = torch.sgn(vectors.gather(-2, index))
    return vectors * torch.where(phase == 0, torch.ones_like(phase), phase).conj()


def solve_from_right(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solve `X @ gram = cross` by ridge regression.

    Args:
        gram: (..., n, n), Hermitian and positive semidefinite, perhaps singular.
        cross: (..., m, n).
        ridge: what is added to the diagonal of `gram`, after its diagonal is scaled to one.

    Returns:
        X, (..., m, n).
    """
    size = gram.diagonal(dim1=-2, dim2=-1).real.clamp_min(1e-200).sqrt()
    scaled = gram / size[..., :, None] / size[..., None, :]
    scaled = scaled + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    right = (cross / size[..., None, :]).mH
    solution: Tensor = single_threaded_lapack(lambda left: torch.linalg.solve(left, right), scaled)
    return solution.mH / size[..., None, :]
