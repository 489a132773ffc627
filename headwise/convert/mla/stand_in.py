"""Replace norms on queries and keys by linear maps of the attention's input (mathematics, section 4d).

The weight of the norm is folded into the rows. What is left of the norm is one scale for each token and head, which
is no linear function of the input. The linear map of least squared error is the regression of the normed rows on
the input, and a scale that does not vary is its special case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.convert.linalg import solve_from_right
from headwise.models.layout import LayerWeights

# The weight of the mean scale in tokens for each input, relative to a moment of unit diagonal: it decides where the
# text has little of a direction (docs/decisions/0030).
PRIOR = 0.3


@dataclass(frozen=True)
class NormReport:
    """What linear maps do not hold of the norms on queries and keys.

    Attributes:
        query_scale_variance: variance of the scale 1 / rms over tokens, relative to its squared mean; mean over
            heads.
        key_scale_variance: the same of the keys, each token weighted by the attention it gets.
        query_residual: squared error of the linear queries relative to the energy of the normed ones.
        key_residual: the same of the keys, weighted as above.
    """

    query_scale_variance: float
    key_scale_variance: float
    query_residual: float
    key_residual: float


def linear_stand_in(
    weights: LayerWeights,
    *,
    moment: Tensor,
    key_moment: Tensor,
    query_cross: Tensor,
    key_cross: Tensor,
    query_scales: Tensor,
    key_scales: Tensor,
    regress: bool = True,
) -> tuple[LayerWeights, NormReport]:
    """Return a layer without norms whose queries and keys are nearest to the normed ones.

    Args:
        weights: a layer with norms, float64.
        moment: (D + 1, D + 1) E[x x^T] of the attention input with a constant 1 appended.
        key_moment: (D + 1, D + 1) the same, each token weighted by the attention it gets.
        query_cross: (H, head_dim, D + 1) E[q x^T] of the normed queries.
        key_cross: (G, head_dim, D + 1) E[k x^T] of the normed keys, weighted as `key_moment`.
        query_scales: (4, H) means of the norm's scale s, of s^2 and of |q|^2, and the effective number of tokens.
        key_scales: (4, G) the same of the keys.
        regress: False: multiply the rows by the mean scale, the baseline.

    Returns:
        The layer, and what it leaves out.
    """
    q, query_residual = _stand_in(weights.q, weights.q_norm, moment, query_cross, query_scales, regress)
    k, key_residual = _stand_in(weights.k, weights.k_norm, key_moment, key_cross, key_scales, regress)
    report = NormReport(_variance(query_scales), _variance(key_scales), query_residual, key_residual)
    return replace(weights, q=q, k=k, q_norm=None, k_norm=None, norm_scope=None), report


def unit_scale(weights: LayerWeights) -> LayerWeights:
    """Return a layer without norms, with the scales that inputs of unit moment have on average.

    Args:
        weights: a layer with or without norms.
    """

    def fold(rows: Tensor, multiplier: Tensor | None) -> Tensor:
        if multiplier is None:
            return rows
        energy = rows.square().sum(-1).mean(-1, keepdim=True)
        energy = energy.mean().expand_as(energy) if weights.norm_scope == "all" else energy
        return (multiplier / energy.clamp_min(torch.finfo(rows.dtype).tiny).sqrt())[..., None] * rows

    q, k = fold(weights.q, weights.q_norm), fold(weights.k, weights.k_norm)
    return replace(weights, q=q, k=k, q_norm=None, k_norm=None, norm_scope=None)


def _stand_in(
    rows: Tensor, multiplier: Tensor | None, moment: Tensor, cross: Tensor, scales: Tensor, regress: bool
) -> tuple[Tensor, float]:
    """Return the linear rows (heads, head_dim, inputs) and their relative squared error."""
    if multiplier is None:
        raise ValueError("the layer has no norms on queries and keys")
    inputs = rows.shape[2]
    moment, cross = moment[:inputs, :inputs].to(rows), cross[..., :inputs].to(rows)
    linear = scales[0].to(rows)[:, None, None] * multiplier[..., None] * rows
    if regress:
        missing = (cross - linear @ moment).flatten(0, 1)
        ridge = PRIOR * inputs / max(float(scales[3, 0]), 1.0)
        linear = linear + solve_from_right(moment, missing, ridge).view_as(rows)
    energy = scales[2].sum().to(rows)
    error = energy - 2 * (linear * cross).sum() + (linear @ moment * linear).sum()
    return linear, float((error / energy.clamp_min(torch.finfo(rows.dtype).tiny)).clamp_min(0))


def _variance(scales: Tensor) -> float:
    """Return the variance of the scale relative to its squared mean, a mean over heads."""
    return float((scales[1] / scales[0].square() - 1).clamp_min(0).mean())
