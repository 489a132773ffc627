"""Merge several heads into one by their second moments: mathematics, section 2.

Shared rows are always a mixture of the members' rows. Which mixture depends on the members only through their
second moments, so a merge method that needs moments (registry.py) is a pure function of two arrays:

- `gram` (..., g, n, g, n): E[(row_a of member i)(row_b of member j)^H];
- `costs` (..., g, n, n): an error e in the rows of member j costs `e^H costs_j e`;

and of the flag `sign_only`, for rows under a query-key norm: `sign_aligned_mean` is all that the norm permits.
It returns

- `mix` (..., n, g, n), which makes the shared rows: `shared = sum_j mix[:, j] @ rows_j`;
- `maps` (..., g, n, n), which bring each member back: `rows_j ~ maps_j @ shared`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from headwise.convert.linalg import fix_phase, single_threaded_lapack, sqrt_and_pinv, top_eigenpairs

# In place of a size of zero, where the size is a divisor.
TINY = 1e-300


class MergeMethod(Protocol):
    """The signature of a merge method that needs moments."""

    def __call__(self, gram: Tensor, costs: Tensor, *, sign_only: bool = False) -> tuple[Tensor, Tensor]:
        """Return mix and maps."""


def optimal(gram: Tensor, costs: Tensor, *, sign_only: bool = False) -> tuple[Tensor, Tensor]:
    """Merge at the least expected cost: weighted PCA (mathematics, section 2).

    With costs `R^H R`, stack `R_j rows_j`, keep the n leading principal components U of the stack, share
    `U^H stack` and return through `R_j^+ U_j`. No inverse of the moment is taken.

    Args:
        gram: (..., g, n, g, n) second moments of the members' rows.
        costs: (..., g, n, n).
        sign_only: merge by `sign_aligned_mean`, with these costs.

    Returns:
        mix (..., n, g, n) and maps (..., g, n, n).
    """
    if sign_only:
        return sign_aligned_mean(gram, costs)
    g, n = gram.shape[-2:]
    weight, inverse = sqrt_and_pinv(costs)
    values, vectors = top_eigenpairs(transformed_gram(gram, weight).flatten(-2, -1).flatten(-3, -2), n)
    u = fix_phase(vectors).unflatten(-2, (g, n))  # (..., g, n, n)
    mix, maps = u.mH @ weight, inverse @ u
    # The pair is free up to a scale: give the shared rows the members' mean size, which trains and rounds best.
    size = values.sum(-1).clamp_min(TINY).sqrt()
    scale = _energies(gram).clamp_min(0).mean(-1).sqrt() / size
    scale = torch.where(scale > 0, scale, 1.0)  # rows of zeros have no size
    return (mix * scale[..., None, None, None]).transpose(-3, -2), maps / scale[..., None, None, None]


def aligned(gram: Tensor, costs: Tensor, *, sign_only: bool = False, num_rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Rotate the members onto their mean and average: generalized Procrustes (Jin et al. 2024, arXiv 2412.20677).

    In a rotary plane the unitary map is a phase. The mean is rescaled to the members' mean norm.

    Args:
        gram: (..., g, n, g, n) second moments of the members' rows.
        costs: not used: the method compares heads, not what their errors cost.
        sign_only: merge by `sign_aligned_mean`, with equal costs.
        num_rounds: rounds of aligning every member to the mean of all.

    Returns:
        mix (..., n, g, n) and maps (..., g, n, n).
    """
    if sign_only:
        return sign_aligned_mean(gram, torch.ones_like(costs))
    g, n = gram.shape[-2:]
    whole = gram.flatten(-2, -1).flatten(-3, -2)
    rotation = torch.eye(n, dtype=gram.dtype, device=gram.device).expand(*gram.shape[:-4], g, n, n)
    mix = torch.zeros_like(whole[..., :n, :])
    mix[..., :n] = rotation[..., 0, :, :]
    for _ in range(num_rounds):
        left, _, right = torch.linalg.svd((mix @ whole).unflatten(-1, (g, n)).transpose(-3, -2))
        rotation = left @ right
        mix = rotation.transpose(-3, -2).flatten(-2, -1) / g
    size = torch.einsum("...ij,...ji->...", mix @ whole, mix.mH).real.clamp_min(TINY).sqrt()
    scale = _energies(gram).clamp_min(0).sqrt().mean(-1) / size
    return (mix * scale[..., None, None]).unflatten(-1, (g, n)), rotation.mH


def sign_aligned_mean(gram: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Average the members by their costs, each after the sign (of a complex `gram`: the phase) that fits best.

    A query-key norm permits no more: its weight forbids mixing rows, and it removes any scale.

    Args:
        gram: (..., g, 1, g, 1) second moments, one row per member.
        costs: (..., g, 1, 1).

    Returns:
        mix (..., 1, g, 1) and maps (..., g, 1, 1).
    """
    g = gram.shape[-2]
    cost = costs.real.clamp_min(0).flatten(-3)  # (..., g)
    weighted = cost.sqrt()[..., :, None] * gram.reshape(*cost.shape, g) * cost.sqrt()[..., None, :]
    vectors = single_threaded_lapack(torch.linalg.eigh, weighted)[1]
    phase = torch.sgn(fix_phase(vectors[..., -1:]))[..., 0]
    phase = torch.where(phase == 0, torch.ones_like(phase), phase)
    share = cost / cost.sum(-1, keepdim=True).clamp_min(TINY)
    return (share * phase.conj())[..., None, :, None], phase[..., None, None]


def expected_cost(gram: Tensor, costs: Tensor, mix: Tensor, maps: Tensor) -> Tensor:
    """Return the expected cost of `maps_j @ shared` in place of every member's rows, summed over everything.

    Args:
        gram: (..., g, n, g, n) second moments of the members' rows.
        costs: (..., g, n, n).
        mix: (..., n, g, n), as a merge method returns it.
        maps: (..., g, n, n), likewise.

    Returns:
        A real scalar.
    """
    g, n = gram.shape[-2:]
    error = -maps @ mix.flatten(-2, -1).unsqueeze(-3)  # (..., g, n, g n): the error, by the members' rows
    for j in range(g):
        error[..., j, :, j * n : (j + 1) * n].diagonal(dim1=-2, dim2=-1).add_(1)
    moment = error @ gram.flatten(-2, -1).flatten(-3, -2).unsqueeze(-3) @ error.mH
    return (costs * moment.mT).sum().real


def transformed_gram(gram: Tensor, weight: Tensor) -> Tensor:
    """Return the second moments of `weight_j @ rows_j`.

    Args:
        gram: (..., g, n, g, n) second moments of the rows.
        weight: (..., g, n, n).

    Returns:
        (..., g, n, g, n).
    """
    left = weight.unsqueeze(-3) @ gram.transpose(-3, -2)  # (..., g, g, n, n)
    return (left @ weight.mH.unsqueeze(-4)).transpose(-3, -2)


def _energies(gram: Tensor) -> Tensor:
    """Return E|rows_j x|^2 of every member, (..., g)."""
    return torch.einsum("...jaja->...j", gram).real
