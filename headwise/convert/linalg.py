"""Linear algebra of second moments: square roots, leading eigenvectors, ridge regression (float64, batched).

A moment is a Hermitian positive semidefinite matrix `E[x x^H]`. These functions do not depend on attention.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Eigenvalues below this share of the largest one count as zero in a pseudo-inverse.
TOLERANCE = 1e-12
# Problems up to this order run on one thread, and are decomposed in full even where few eigenvectors are needed.
SMALL_ORDER = 1024
# The largest matrices of which a GPU solves many at once, and how many.
BATCHED_ORDER, MATRICES_AT_ONCE = 32, 4096
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

    basis: Tensor = _start(order, int(OVERSAMPLING * count)).to(matrix).expand(*matrix.shape[:-2], -1, -1)
    for _ in range(NUM_ITERATIONS):
        basis = orthonormal(multiply(basis))
    values, vectors = torch.linalg.eigh(basis.mH @ multiply(basis))
    return values[..., -count:].flip(-1), basis @ vectors[..., -count:].flip(-1)


@lru_cache(2)
def _start(order: int, count: int) -> Tensor:
    """Return random columns, drawn on the CPU so that every device starts from the same numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(order, count, generator=generator, dtype=torch.float64, device="cpu")


def eigenvalues(matrices: Tensor) -> Tensor:
    """Return the eigenvalues of many small Hermitian matrices, rising.

    A GPU solves matrices above `BATCHED_ORDER` one after another, so that threads of the host are faster: 896 of
    order 64 took 287 ms on an H200, and 165 ms on one core beside it. Smaller ones it solves at once, with a
    megabyte of work space for each.

    Args:
        matrices: (..., n, n).

    Returns:
        (..., n).
    """
    if not matrices.is_cuda:
        values: Tensor = single_threaded_lapack(torch.linalg.eigvalsh, matrices)
        return values
    flat = matrices.flatten(0, -3)
    if matrices.shape[-1] <= BATCHED_ORDER:
        values = torch.cat([torch.linalg.eigvalsh(part) for part in flat.split(MATRICES_AT_ONCE)])
    else:
        threads = torch.get_num_threads()

        def solve(host: Tensor) -> Tensor:
            with ThreadPoolExecutor(threads) as pool:
                return torch.cat(list(pool.map(torch.linalg.eigvalsh, host.chunk(threads))))

        values = single_threaded_lapack(solve, flat.cpu()).to(matrices.device)
    values = values.unflatten(0, matrices.shape[:-2])
    return values


def orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the space that some columns span.

    A GPU takes the products of the columns and factors them three times, at first with a shift (Fukaya et al.
    2020, SIAM J. Sci. Comput. 42, algorithm 4.2). Its Householder reflections took most of the time of
    `top_eigenpairs`; they remain for columns that depend on each other.

    Args:
        columns: (..., n, count), real or complex, n >= count.

    Returns:
        (..., n, count).
    """
    if columns.is_cuda:
        n, count = columns.shape[-2:]
        shift = 11 * (n + count + 1) * count * torch.finfo(columns.dtype).eps
        basis, failed = columns, columns.new_zeros((), dtype=torch.int32)
        for step in range(3):
            gram = basis.mH @ basis
            if not step:
                diagonal = gram.diagonal(dim1=-2, dim2=-1)
                diagonal += shift * diagonal.real.sum(-1, keepdim=True)
            factor, info = torch.linalg.cholesky_ex(gram)
            failed = failed + info.abs().sum()
            basis = torch.linalg.solve_triangular(factor.mH, basis, upper=True, left=False)
        if not failed:
            return basis
    reflected: Tensor = torch.linalg.qr(columns).Q
    return reflected


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
    if gram.dim() == 2 and cross.dim() > 2:  # one factorisation for all
        return solve_from_right(gram, cross.flatten(0, -2), ridge).reshape(cross.shape)
    size = gram.diagonal(dim1=-2, dim2=-1).real.clamp_min(1e-200).sqrt()
    scaled = gram / size[..., :, None] / size[..., None, :]
    scaled = scaled + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return solve_positive(scaled, (cross / size[..., None, :]).mH).mH / size[..., None, :]


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve `matrix @ X = right` by Cholesky's factorisation.

    It has half the operations of the LU factorisation, and no search for pivots, which a GPU waits for. A matrix
    that is not positive definite by its rounding is solved by the LU factorisation.

    Args:
        matrix: (..., n, n), Hermitian and positive definite.
        right: (..., n, m).

    Returns:
        X, (..., n, m).
    """

    def solve(left: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(left)
        if failed.any():
            solution: Tensor = torch.linalg.solve(left, right)
            return solution
        return torch.cholesky_solve(right, factor)

    result: Tensor = single_threaded_lapack(solve, matrix)
    return result
