"""Linear algebra of moments: subspace iteration, square roots, ridge regression."""

from __future__ import annotations

import pytest
import torch

from headwise.convert import linalg


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_subspace_iteration_finds_the_leading_eigenpairs(monkeypatch, dtype):
    factor = torch.randn(2, 96, 80, dtype=dtype, generator=torch.Generator().manual_seed(0))
    factor = factor * torch.arange(1, 81) ** -1.5
    moment = factor @ factor.mH
    values, vectors = linalg.top_eigenpairs(moment, 4)
    monkeypatch.setattr(linalg, "SMALL_ORDER", 8)
    for few, found in (linalg.top_eigenpairs(moment, 4), linalg.top_eigenpairs(factor, 4, factor.mH)):
        torch.testing.assert_close(few, values, rtol=1e-4, atol=0)
        assert (vectors.mH @ found).abs().square().sum((-2, -1)).min() > 4 - 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_square_roots_of_a_singular_moment(dtype):
    factor = torch.randn(3, 8, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    moment = factor @ factor.mH
    root, pinv = linalg.sqrt_and_pinv(moment)
    torch.testing.assert_close(root.mH @ root, moment)
    torch.testing.assert_close(root @ pinv @ root, root)
    symmetric = linalg.symmetric_sqrt(moment)
    torch.testing.assert_close(symmetric, symmetric.mH)
    torch.testing.assert_close(symmetric @ symmetric, moment)


def test_ridge_regression_from_the_right_keeps_a_redundant_unknown_small():
    rows = torch.randn(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, rows[:1]])
    known = torch.tensor([[1.0, -2.0, 0.5, 3.0, 1.0]], dtype=torch.float64)
    solution = linalg.solve_from_right(rows @ rows.T, known @ rows @ rows.T, 1e-9)
    torch.testing.assert_close(solution, known, rtol=1e-5, atol=1e-5)
    assert linalg.solve_from_right(rows @ rows.T, known @ rows @ rows.T, 10.0).norm() < known.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_gpu_finds_the_eigenvalues_and_the_basis_of_a_cpu(order, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 5, order, 2 * order, generator=generator, dtype=dtype)
    moments = rows @ rows.mH
    expected = linalg.eigenvalues(moments)
    torch.testing.assert_close(linalg.eigenvalues(moments.cuda()).cpu(), expected)
    assert expected.shape == (3, 5, order)
    columns = torch.randn(200, order, generator=generator, dtype=dtype) * torch.logspace(0, -9, order).to(dtype)
    basis = linalg.orthonormal(columns.cuda()).cpu()
    torch.testing.assert_close(basis.mH @ basis, torch.eye(order, dtype=dtype))
    torch.testing.assert_close(basis @ (basis.mH @ columns), columns)
    dependent = linalg.orthonormal(columns[:, [0, 0]].cuda()).cpu()
    torch.testing.assert_close(dependent.mH @ dependent, torch.eye(2, dtype=dtype))


def test_one_thread_for_small_problems_only(monkeypatch):
    used = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(linalg, "SMALL_ORDER", 8)
        for order in (8, 9):
            linalg.single_threaded_lapack(lambda matrix: used.append(torch.get_num_threads()), torch.eye(order))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert used == [1, 2]


def test_eigenvectors_are_fixed_up_to_nothing():
    vectors = torch.randn(6, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    phase = torch.polar(torch.ones(3), torch.tensor([0.3, 2.0, 4.0])).to(vectors)
    torch.testing.assert_close(linalg.fix_phase(vectors * phase), linalg.fix_phase(vectors))
