"""The ways to make one head out of several: pure functions on rows, mathematics section 2.

Every method takes the members' rows (..., g, n, inputs), the cost of errors in them (..., g, n, n: an error e in
member j costs `e^H costs_j e`) and the second moment of the input (None: the identity). It returns the shared
rows (..., n, inputs) and the maps (..., g, n, n) that bring each member back: `rows_j ~ maps_j @ shared`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Directions whose energy is below this share of the largest are treated as absent (pseudo-inverse).
TOLERANCE = 1e-12

Method = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def second_moment(a: Tensor, b: Tensor, moment: Tensor | None) -> Tensor:
    """E[(a x)(b x)^H] for rows a (..., n, inputs) and b (..., m, inputs)."""
    if moment is not None:
        a = a @ moment.to(a.dtype)
    return a @ b.mH


def optimal(rows: Tensor, costs: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """The merge of least expected cost: top eigenvectors of the weighted members' second moment.

    With costs `R^H R`, stack `R_j rows_j`, keep the n leading principal components U of the stack, share
    `U^H stack` and return through `R_j^+ U_j` (mathematics, section 2). No inverse of the moment is taken.
    """
    g, n = rows.shape[-3:-1]
    weight, inverse = root(costs)
    stack = (weight @ rows).flatten(-3, -2)
    _, vectors = torch.linalg.eigh(second_moment(stack, stack, moment))
    u = _canonical(vectors[..., -n:].flip(-1))
    shared, maps = u.mH @ stack, inverse @ u.unflatten(-2, (g, n))
    # The pair is free up to a scale: give the shared rows the members' mean size, which trains and rounds best.
    scale = _norm(rows, moment).square().mean(-1).sqrt() / _norm(shared, moment).clamp_min(1e-300)
    return shared * scale[..., None, None], maps / scale[..., None, None, None]


def aligned(rows: Tensor, costs: Tensor, moment: Tensor | None, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Generalised Procrustes: turn every member by a unitary map onto the mean, then average (Jin et al. 2024).

    In a rotary plane the unitary map is a phase. The mean is rescaled to the members' mean norm. `costs` is
    not used: the method compares heads, not what they cost.
    """
    target = rows[..., 0, :, :]
    turn = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    for _ in range(rounds):
        left, _, right = torch.linalg.svd(second_moment(target.unsqueeze(-3), rows, moment))
        turn = left @ right
        target = (turn @ rows).mean(-3)
    scale = _norm(rows, moment).mean(-1) / _norm(target, moment).clamp_min(1e-300)
    return target * scale[..., None, None], turn.mH.expand(*rows.shape[:-1], rows.shape[-2])


def mean(rows: Tensor, costs: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """The average of the members (Ainslie et al. 2023, arXiv 2305.13245)."""
    return rows.mean(-3), identity_maps(rows)


def first(rows: Tensor, costs: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first member for all."""
    return rows[..., 0, :, :], identity_maps(rows)


def phased(rows: Tensor, costs: Tensor, moment: Tensor | None, free: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cost-weighted mean of members after the best sign (a phase where `free`) for each.

    All that a query-key norm permits: its weight forbids mixing rows, and it undoes any scale.
    """
    cost = costs.real.clamp_min(0)
    gram = second_moment((cost.sqrt() * rows).flatten(-3, -2), (cost.sqrt() * rows).flatten(-3, -2), moment)
    if rows.is_complex():
        keep = torch.zeros(gram.shape[0], dtype=torch.bool) if free is None else free
        gram = torch.where(keep[:, None, None], gram, gram.real.to(gram.dtype))
    _, vectors = torch.linalg.eigh(gram)
    phase = torch.sgn(_canonical(vectors[..., -1:]))[..., None]
    phase = torch.where(phase == 0, torch.ones_like(phase), phase)
    share = cost / cost.sum(-3, keepdim=True).clamp_min(1e-300)
    return (share * phase.conj() * rows).sum(-3), phase


def _norm(rows: Tensor, moment: Tensor | None) -> Tensor:
    """sqrt(E|rows x|^2) over the last two axes."""
    weighted = rows if moment is None else rows @ moment.to(rows.dtype)
    return (weighted * rows.conj()).sum((-2, -1)).real.clamp_min(0).sqrt()


def root(costs: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^H R = costs, and its pseudo-inverse; (..., n, n) each."""
    values, vectors = torch.linalg.eigh(costs)
    values = values.clamp_min(0)
    present = values > TOLERANCE * values.amax(-1, keepdim=True)
    scale = values.sqrt() * present
    inverse = torch.where(present, 1 / scale, 0.0)
    return scale[..., None] * vectors.mH, vectors * inverse[..., None, :]


def _canonical(vectors: Tensor) -> Tensor:
    """Eigenvectors with the phase fixed by their largest entry, so that equal inputs give equal bytes."""
    index = vectors.abs().argmax(-2, keepdim=True)
    phase = torch.sgn(vectors.gather(-2, index))
    return vectors * torch.where(phase == 0, torch.ones_like(phase), phase).conj()


def identity_maps(rows: Tensor) -> Tensor:
    n = rows.shape[-2]
    return torch.eye(n, dtype=rows.dtype, device=rows.device).expand(*rows.shape[:-1], n)


# "random" is "first" after the groups were shuffled (`heads.merge`).
METHODS: dict[str, Method] = {
    "optimal": optimal,
    "aligned": aligned,
    "mean": mean,
    "first": first,
    "random": first,
}
