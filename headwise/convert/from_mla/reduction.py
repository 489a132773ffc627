"""Reduce the rank of a latent whose norm stays, and the width of its rotary key: mathematics, section 4g.

Linear algebra on one layer, in float64. The latent is `c = w * n`, `n = z / sqrt(mean(z^2) + eps)`, `z = A x`.
It keeps a norm: the rows of the new `A` are such that the new mean square is the best estimate of the old one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.models.layout import NormedLatent, from_planes, to_planes

# Eigenvalues below this share of the largest one count as zero.
TOLERANCE = 1e-12
# Without measured attention, a query averages this many independent tokens, and attention falls with the distance.
TOKENS_READ, LENGTH = 2, 1024


@dataclass(frozen=True)
class LatentStatistics:
    """What is known of the latents and the queries of a layer.

    Attributes:
        mean: (R,) of the normed latent `n`, before the norm's weight.
        covariance: (R, R) of the same.
        queries: (H, N + P, N + P) second moment of each head's queries, rotary rows last.
        rotary_keys: (P, P) second moment of the rotary key before its rotation.
    """

    mean: Tensor
    covariance: Tensor
    queries: Tensor
    rotary_keys: Tensor


@dataclass(frozen=True)
class ReductionReport:
    """The expected squared error of a layer's output, relative to the energy of what scores and values add to it.

    Attributes:
        key_error: the part caused by errors of attention scores.
        value_error: the part caused by errors of values.
    """

    key_error: float
    value_error: float


def reduce_latent(
    weights: NormedLatent, statistics: LatentStatistics, rank: int, rope_dim: int, *, scale: float, theta: float
) -> tuple[NormedLatent, ReductionReport]:
    """Return a layer with a latent of lower rank and a narrower rotary key.

    Args:
        weights: the layer, float64.
        statistics: of its inputs.
        rank: of the new latent, at most R.
        rope_dim: width of the new rotary key, P or P divided by a whole number.
        scale: the factor on the layer's scores.
        theta: the RoPE base; both rotary keys turn by its default frequencies.

    Returns:
        The reduced layer, float64, and its expected error. Queries make up for the scale of the stock class, which
        follows the width of a key.
    """
    effect = scale**2 * score_spread(weights, statistics)
    latent, report = _reduce_rank(weights, statistics, rank, effect)
    if rope_dim < weights.layout.rotary_dim:
        latent, rotary_error = _narrow_rotary_key(latent, statistics, rope_dim, effect, theta)
        report = replace(report, key_error=report.key_error + rotary_error)
    return latent, report


def score_spread(weights: NormedLatent, statistics: LatentStatistics) -> Tensor:
    """Return by how much an error of a head's scores changes the output: (H,), the spread of its values.

    Args:
        weights: the layer.
        statistics: of its inputs.
    """
    values = torch.einsum("hdv,hvr->hdr", weights.o, weights.v_up * weights.norm)
    return torch.einsum("hdr,rs,hds->h", values, statistics.covariance / TOKENS_READ, values).clamp_min(0)


def _metrics(weights: NormedLatent, statistics: LatentStatistics, effect: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error of the output for an error of `n`, by scores and by values: (R, R) each."""
    nope = weights.q_nope.shape[1]
    keys, values = weights.k_up * weights.norm, weights.v_up * weights.norm
    queries = statistics.queries[:, :nope, :nope] * effect[:, None, None]
    output = torch.einsum("hdv,hdw->hvw", weights.o, weights.o)
    return (
        torch.einsum("har,hab,hbs->rs", keys, queries, keys),
        torch.einsum("har,hab,hbs->rs", values, output, values),
    )


def _reduce_rank(
    weights: NormedLatent, statistics: LatentStatistics, rank: int, effect: Tensor
) -> tuple[NormedLatent, ReductionReport]:
    by_scores, by_values = _metrics(weights, statistics, effect)
    read = statistics.covariance / TOKENS_READ + torch.outer(statistics.mean, statistics.mean)
    total = float(torch.trace(by_scores @ statistics.covariance) + torch.trace(by_values @ read)) or 1.0
    if rank == len(weights.norm):
        return weights, ReductionReport(0.0, 0.0)
    # One moment for both errors: a shift of all scores by the mean has no effect, and its one direction is kept.
    moment = TOKENS_READ * read
    root, inverse = _roots(moment)
    vectors = torch.linalg.eigh(root @ (by_scores + by_values / TOKENS_READ) @ root)[1].flip(1)[:, :rank]
    down, up = vectors.T @ inverse, root @ vectors
    rest = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) - up @ down
    errors = (
        float(torch.trace(metric @ rest @ each @ rest.T).clamp_min(0)) / total
        for metric, each in ((by_scores, statistics.covariance), (by_values, read))
    )
    # Of unit moment, the new latent estimates the old one by `up`, and the old mean square by this form.
    form = up.T @ up
    form = form * (rank / len(moment)) * float(torch.trace(moment) / torch.trace(form))
    sizes, basis = torch.linalg.eigh(form)
    sizes, basis = sizes.flip(0), basis.flip(1)
    sizes = sizes.clamp_min(TOLERANCE * float(sizes[0])).sqrt()
    level = 2.0 ** round(math.log2(float(weights.norm.square().mean().sqrt()) or 1.0))
    reads = weights.norm[:, None] * (up @ basis / sizes) / level
    return (
        replace(
            weights,
            layout=replace(weights.layout, kv_lora_rank=rank),
            kv_down=sizes[:, None] * (basis.T @ (down @ weights.kv_down)),
            norm=weights.norm.new_full((rank,), level),
            k_up=weights.k_up @ reads,
            v_up=weights.v_up @ reads,
        ),
        ReductionReport(*errors),
    )


def _narrow_rotary_key(
    weights: NormedLatent, statistics: LatentStatistics, rope_dim: int, effect: Tensor, theta: float
) -> tuple[NormedLatent, float]:
    """Replace each group of neighbouring planes by the plane that carries most of their scores.

    The first of a group has the frequency of the new plane. A plane of another frequency counts by the mean of the
    phase that it gains on the first one over the distances that attention looks back.
    """
    nope, half, planes = weights.q_nope.shape[1], weights.layout.rotary_dim // 2, rope_dim // 2
    folded = half // planes
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64, device=weights.o.device) / half)
    groups = frequencies.view(planes, folded)
    distances = torch.arange(LENGTH, dtype=torch.float64, device=weights.o.device)
    weight = 1 / (1 + distances)
    turned = torch.exp(-1j * (groups - groups[:, :1])[..., None] * distances)
    phase = (turned * (weight / weight.sum())).sum(-1)
    keys = phase[..., None] * to_planes(weights.k_rope, 2 * half).view(planes, folded, -1)
    queries = to_planes(weights.q_rope, 2 * half).unflatten(1, (planes, folded))
    metric = _plane_moments(statistics.queries[:, nope:, nope:], folded)
    metric = torch.einsum("h,hpab->pab", effect.to(metric.dtype), metric)
    whole = _plane_moments(statistics.rotary_keys[None], folded)[0]
    moment = phase[:, :, None] * whole * phase[:, None, :].conj()
    root, inverse = _roots(moment)
    energies, vectors = torch.linalg.eigh(root @ metric @ root)
    leading = vectors[..., -1]
    down = (leading.conj()[:, None] @ inverse)[:, 0]
    up = (root @ leading[..., None])[..., 0]
    k_rope = torch.einsum("pf,pfi->pi", down, keys)
    q_rope = torch.einsum("pf,hpfi->hpi", up.conj(), queries)
    lost = float(torch.einsum("pab,pba->", metric, whole).real - energies[:, -1].sum())
    total = float(torch.einsum("pab,pba->", metric, whole).real) or 1.0
    layout = weights.layout
    grown = math.sqrt((nope + rope_dim) / layout.head_dim)
    layout = replace(layout, head_dim=nope + rope_dim, rotary_dim=rope_dim, qk_rope_head_dim=rope_dim)
    return (
        replace(
            weights,
            layout=layout,
            k_rope=from_planes(k_rope),
            q_nope=weights.q_nope * grown,
            q_rope=from_planes(q_rope) * grown,
        ),
        max(lost, 0.0) / total,
    )


def _plane_moments(moments: Tensor, folded: int) -> Tensor:
    """Return E[a conj(a)^T] of the planes in each group from real moments, (heads, groups, folded, folded)."""
    half = moments.shape[-1] // 2
    to_complex = torch.cat([torch.eye(half), 1j * torch.eye(half)], 1).to(moments.device, torch.complex128)
    whole = to_complex @ moments.to(torch.complex128) @ to_complex.mH
    blocks = whole.unflatten(2, (-1, folded)).unflatten(1, (-1, folded))
    return torch.stack([blocks[:, g, :, g] for g in range(half // folded)], 1)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square roots of Hermitian moments and of their pseudo-inverses."""
    energies, vectors = torch.linalg.eigh(moment)
    present = energies > TOLERANCE * energies[..., -1:]
    sizes = torch.where(present, energies, 1.0).sqrt()
    scaled = vectors * (sizes * present).unsqueeze(-2), vectors * (present / sizes).unsqueeze(-2)
    return scaled[0] @ vectors.mH, scaled[1] @ vectors.mH
