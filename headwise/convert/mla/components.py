"""Shared key components per frequency, and the joint low rank of what remains: the start of the factorization.

Mathematics, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.convert.linalg import symmetric_sqrt, top_eigenpairs
from headwise.convert.mla.features import Features, LayerStatistics, mean_phase
from headwise.models.layout import LayerWeights, from_planes, to_planes

# In place of a size of zero, where the size is a divisor.
TINY = 1e-150


def initial_features(
    weights: LayerWeights,
    frequencies: Tensor,
    rope_frequencies: Tensor,
    rank: int,
    statistics: LayerStatistics,
    folding: int,
    value_root: Tensor,
) -> Features:
    """Return score-weighted complex components, one per rotary plane of the MLA layer, and the joint low rank.

    At each frequency the rows of all heads are scaled by the square root of the energy of the queries that multiply
    them. A plane of the MLA layer takes the top component of the `folding` neighbouring frequencies around its own.
    Each of these counts by how well the plane's frequency approximates it, `m_f = E[e^{-i (w_f - w) D}]`. The
    component is removed from the rows. The rest becomes position-free and counts by `m_f = E[e^{-i w_f D}]`.

    Args:
        weights: the source layer, float64, with an input column for the constant.
        frequencies: (F,) radians per token of its rotary planes.
        rope_frequencies: (P / 2,) radians per token of the MLA layer's rotary planes.
        rank: of the latent.
        statistics: of the attention inputs.
        folding: the number of neighbouring frequencies taken as one.
        value_root: from `value_cost_root`.
    """
    rotary, shape = weights.layout.rotary_dim, weights.k.shape
    rest = weights.k.clone()
    rotary_rows = rest.new_zeros(len(rope_frequencies), shape[2], dtype=torch.complex128)
    if rotary:
        energy = query_energy(weights, statistics).sqrt()[:, :, None].clamp_min(TINY)
        scaled, scaled_moment = (energy * to_planes(k, rotary) for k in (weights.k, weights.k @ statistics.inputs))
        distances = statistics.distances.mean(0)
        for i, (block, frequency) in enumerate(folded_blocks(frequencies, rope_frequencies, folding)):
            fidelity = mean_phase(distances, frequencies[block] - frequency).repeat(shape[0])
            stack, moment = scaled[:, block].flatten(0, 1), scaled_moment[:, block].flatten(0, 1)
            gram = (fidelity[:, None] * moment) @ (fidelity[:, None] * stack).mH
            top = fidelity.conj() * torch.linalg.eigh(gram)[1][:, -1]
            top = top / top.norm().clamp_min(TINY)
            rotary_rows[i] = top.conj() @ stack
            for every, part in ((scaled, stack), (scaled_moment, moment)):
                every[:, block] = (part - top[:, None] * (top.conj() @ part)).unflatten(0, (shape[0], -1))
        m = mean_phase(distances, frequencies[: rotary // 2]).abs()[:, None]
        rest[:, :rotary] = from_planes(m * scaled)
        free = weights.q[:, rotary:]
        free_energy = torch.einsum("hfi,ij,hfj->hf", free, statistics.inputs, free)
        rest[:, rotary:] *= free_energy.unflatten(0, (shape[0], -1)).sum(1).sqrt()[:, :, None]
    latent, _, _ = joint_low_rank(rest, value_root @ weights.v, rank, statistics)
    return Features(rotary_rows, rope_frequencies, latent)


def value_cost_root(weights: LayerWeights) -> Tensor:
    """Return the square root of what an error of each KV head's values costs, (G, v_head_dim, v_head_dim).

    Args:
        weights: the source layer.
    """
    output = torch.einsum("hia,hib->hab", weights.o, weights.o)
    return symmetric_sqrt(output.unflatten(0, (weights.layout.num_key_value_heads, -1)).sum(1))


def joint_low_rank(
    keys: Tensor, values: Tensor, rank: int, statistics: LayerStatistics, balance: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top components of position-free keys and values together.

    Args:
        keys: (G, d, n), scaled by the cost of errors in them.
        values: (G, v, n), likewise.
        rank: the number of components.
        statistics: of the attention inputs.
        balance: scale keys to the energy of the values first.

    Returns:
        The latent (rank, n), and the maps that give keys (G, d, rank) and values (G, v, rank) back from it.
    """
    groups, width = keys.shape[0], keys.shape[1]
    k, v = keys.flatten(0, 1), values.flatten(0, 1)
    k_moment, v_moment = k @ statistics.inputs, v @ statistics.inputs
    k_energy, v_energy = float((k_moment * k).sum()), float((v_moment * v).sum())
    alpha = (v_energy / k_energy) ** 0.5 if balance and k_energy > 0 else 1.0
    stack, stack_moment = torch.cat([alpha * k, v]), torch.cat([alpha * k_moment, v_moment])
    basis = top_eigenpairs(stack_moment, min(rank, len(stack)), stack.T)[1]
    basis = torch.nn.functional.pad(basis, (0, rank - basis.shape[1]))
    k_up, v_up = basis[: groups * width] / alpha, basis[groups * width :]
    return basis.T @ stack, k_up.unflatten(0, (groups, width)), v_up.unflatten(0, (groups, -1))


def query_energy(weights: LayerWeights, statistics: LayerStatistics) -> Tensor:
    """Return E|q_f|^2 of every plane, summed over the query heads of each KV head, (G, F).

    Args:
        weights: the source layer, with an input column for the constant.
        statistics: of the attention inputs.
    """
    energy = plane_energy(to_planes(weights.q, weights.layout.rotary_dim), statistics)
    total: Tensor = energy.unflatten(0, (weights.layout.num_key_value_heads, -1)).sum(1)
    return total


def plane_energy(stack: Tensor, statistics: LayerStatistics) -> Tensor:
    """Return E|row x|^2 of complex rows (..., n) -> (...).

    Args:
        stack: (..., n) complex rows.
        statistics: of the attention inputs.

    Returns:
        (...), the energies.
    """
    return ((stack @ statistics.inputs.to(torch.complex128)) * stack.conj()).sum(-1).real


def folded_blocks(
    frequencies: Tensor, rope_frequencies: Tensor, folding: int
) -> Sequence[tuple[list[int], Tensor]]:
    """Return, for each rotary plane of the MLA layer, the source planes it may replace and its frequency.

    Args:
        frequencies: (F,) radians per token of the source's planes.
        rope_frequencies: (P / 2,) radians per token of the MLA layer's planes.
        folding: the number of neighbouring frequencies taken as one.
    """
    nearest = (frequencies.log() - rope_frequencies.log()[:, None]).abs().argmin(1) // folding
    count = len(frequencies)
    return [
        (list(range(j * folding, min((j + 1) * folding, count))), w)
        for j, w in zip(nearest.tolist(), rope_frequencies, strict=True)
    ]
