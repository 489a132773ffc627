"""Approximate a layer with any number of KV heads by one latent and one shared rotary key: MHA, GQA, MQA -> MLA.

Linear algebra on one layer, in float64 (mathematics, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise import registry
from headwise.convert.mla.alternating import LatentMethod, LatentObjective, LatentProblem, LatentSolution
from headwise.convert.mla.exact import latent_layout
from headwise.convert.mla.features import LayerStatistics, conjugate_pairs, layer_statistics, with_constant
from headwise.models.layout import LatentWeights, LayerWeights, from_planes

# Alternations after which the expected error falls by less than a hundredth a step on the models measured.
NUM_ITERATIONS = 10
# Eigenvalues below this share of the largest one count as zero.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class LatentReport:
    """The expected error of a converted layer: squared error of its output relative to the output's energy.

    Attributes:
        method: the name of the latent method.
        folding: the number of neighbouring frequencies that were taken as one at the start.
        key_error: the part caused by errors of attention scores.
        value_error: the part caused by errors of values.
        errors: the total after each alternation; empty for a method without alternations.
    """

    method: str
    folding: int
    key_error: float
    value_error: float
    errors: tuple[float, ...] = ()


def approximate_mla(
    weights: LayerWeights,
    frequencies: Tensor,
    *,
    rank: int,
    rope_frequencies: Tensor,
    scale: float,
    method: str = "optimal",
    moment: Tensor | None = None,
    key_moment: Tensor | None = None,
    value_moment: Tensor | None = None,
    distances: Tensor | None = None,
    foldings: Sequence[int] = (1, 2, 4),
    num_iterations: int = NUM_ITERATIONS,
) -> tuple[LatentWeights, LatentReport]:
    """Convert a layer to MLA with a latent of `rank` and a rotary key of `2 * len(rope_frequencies)` elements.

    Args:
        weights: a layer without query-key norms, float64. All other tensors are on its device, and so is the
            result.
        frequencies: (F,) radians per token of the source's rotary planes.
        rope_frequencies: (P / 2,) of the MLA model's: the default grid, or a list of `mla/frequencies.py`.
        rank: of the latent.
        scale: the factor on the source's scores.
        method: the name of a latent method in the registry.
        moment: (D + 1, D + 1) as in `LayerStatistics.inputs`; None: inputs are taken to be uncorrelated.
        key_moment: (D + 1, D + 1) as in `LayerStatistics.keys`; None: attention falls on tokens evenly.
        value_moment: (D + 1, D + 1) as in `LayerStatistics.values`; None likewise.
        distances: (H, length) attention weight by distance; None: 1 / (1 + distance).
        foldings: numbers of neighbouring frequencies to try as one; the least expected error is taken.
        num_iterations: alternations of least squares (method "optimal" only).

    Returns:
        The converted layer, float64, and its expected error.

    Raises:
        SettingError: there is no method of that name.
    """
    solve: LatentMethod = registry.find_method("latent", method).load()
    biased = weights.has_bias
    weights = weights if biased else with_constant(weights)
    statistics = layer_statistics(weights, moment, key_moment, value_moment, distances)
    objective = LatentObjective(weights, frequencies, statistics, scale)
    total = sum(objective.energies) or 1.0
    # A latent wider than the inputs would be linearly dependent, and reading it would amplify rounding.
    used_rank = min(rank, weights.q.shape[2] if biased else weights.q.shape[2] - 1)
    solution = solve(
        LatentProblem(
            weights,
            frequencies,
            rope_frequencies,
            used_rank,
            statistics,
            objective,
            foldings=[f for f in foldings if f <= weights.layout.rotary_dim // 2] or [1],
            num_iterations=num_iterations,
        )
    )
    latent = _pad_rank(_assemble(weights, solution, statistics, scale), rank)
    key_error, value_error = (error / total for error in solution.readout.errors)
    report = LatentReport(method, solution.folding, key_error, value_error, solution.errors)
    return (latent if biased else _without_constant(latent)), report


def _without_constant(latent: LatentWeights) -> LatentWeights:
    """Return the layer without the input column for the constant."""
    names = ("q_nope", "q_rope", "kv_down", "k_rope")
    return replace(latent, **{name: getattr(latent, name)[..., :-1] for name in names})


def _assemble(
    weights: LayerWeights, solution: LatentSolution, statistics: LayerStatistics, scale: float
) -> LatentWeights:
    """Return the layer that caches these features and reads them by this readout.

    Position-free queries are the source's own: the reconstructed key rows are in the up-projection. The latent gets
    the basis in which its elements are uncorrelated, of unit size and ordered by their contribution. The written
    layer has that of `latent_basis.py`.
    """
    features, keys, values = solution.features, solution.readout.keys, solution.readout.values
    layout, rank = weights.layout, len(features.latent)
    rotary, half, count = layout.rotary_dim, layout.rotary_dim // 2, len(features.frequencies)
    queries = conjugate_pairs(weights.q, rotary)
    q_rope = keys[:, :, :count].mH @ queries
    of_latent = keys[:, :, 2 * count :]
    k_up = torch.cat([from_planes(of_latent[:, :half]), of_latent[:, rotary:].real / 2**0.5], 1)
    v_up = values.repeat_interleave(layout.queries_per_group, 0)

    energy, vectors = torch.linalg.eigh(features.latent @ statistics.inputs @ features.latent.T)
    present = energy > TOLERANCE * energy[-1]
    size = torch.where(present, energy, 1.0).sqrt()
    down = (vectors / size * present).T @ features.latent
    up = torch.cat([k_up, v_up], 1) @ (vectors * size * present)
    basis = torch.linalg.eigh(torch.einsum("har,has->rs", up, up))[1].flip(1)
    up = up @ basis
    return LatentWeights(
        layout=latent_layout(layout, rank, 2 * count),
        q_nope=weights.q,
        q_rope=from_planes(q_rope),
        kv_down=basis.T @ down,
        k_rope=from_planes(features.rotary_rows),
        k_up=up[:, : layout.head_dim],
        v_up=up[:, layout.head_dim :],
        o=weights.o,
        frequencies=features.frequencies,
        scale=scale,
    )


def _pad_rank(latent: LatentWeights, rank: int) -> LatentWeights:
    """Fill the latent with zeros up to `rank`."""
    missing = rank - latent.kv_down.shape[0]
    pad = torch.nn.functional.pad
    return replace(
        latent,
        layout=replace(latent.layout, kv_lora_rank=rank),
        kv_down=pad(latent.kv_down, (0, 0, 0, missing)),
        k_up=pad(latent.k_up, (0, missing)),
        v_up=pad(latent.v_up, (0, missing)),
    )
