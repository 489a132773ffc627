"""The published conversions to MLA: TransMLA and MHA2MLA (mathematics, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.convert.mla.alternating import LatentProblem, LatentSolution
from headwise.convert.mla.components import folded_blocks, joint_low_rank
from headwise.convert.mla.features import Features, conjugate_pairs
from headwise.models.layout import LayerWeights, from_planes, to_planes


def transmla(problem: LatentProblem) -> LatentSolution:
    """Apply RoRoPE, FreqFold and balanced joint PCA (Meng et al. 2025, arXiv 2502.07864, sections 4.2 to 4.4).

    The method takes the real part of the components' moment, the energies of keys alone, and position-free keys as
    if they had never been rotated. The folding of least expected error is taken.

    Args:
        problem: one layer, with a rotary embedding.
    """
    return min((_transmla(problem, folding) for folding in problem.foldings), key=lambda solution: solution.error)


def partial_rope(problem: LatentProblem) -> LatentSolution:
    """Apply partial RoPE with joint SVD (Ji et al. 2025, arXiv 2502.14837, section 3).

    Every KV head keeps the same planes (`frequencies.partial_frequencies` chooses them), each in a rotary plane of
    its own. The others become position-free as if they had never been rotated.

    Args:
        problem: one layer, with a rotary embedding, and the kept frequencies once per KV head.
    """
    weights, rope_frequencies = problem.weights, problem.rope_frequencies
    groups, rotary, half = weights.k.shape[0], weights.layout.rotary_dim, weights.layout.rotary_dim // 2
    kept = [int((problem.frequencies - w).abs().argmin()) for w in rope_frequencies[::groups]]
    keys = to_planes(weights.k, rotary)
    rotary_rows = keys[:, kept].transpose(0, 1).flatten(0, 1)
    rotary_maps = keys.new_zeros(groups, half, len(rope_frequencies))
    for j, f in enumerate(kept):
        for g in range(groups):
            rotary_maps[g, f, j * groups + g] = 1
    rest = keys.clone()
    rest[:, kept] = 0
    position_free = torch.cat([from_planes(rest), weights.k[:, rotary:]], 1)
    latent, k_up, v_up = joint_low_rank(position_free, weights.v, problem.rank, problem.statistics, balance=False)
    features = Features(rotary_rows, rope_frequencies, latent)
    readout = problem.objective.solve_readout(features, _key_maps(weights, rotary_maps, k_up), v_up)
    return LatentSolution(features, readout)


def _transmla(problem: LatentProblem, folding: int) -> LatentSolution:
    weights, rope_frequencies = problem.weights, problem.rope_frequencies
    groups, rotary, half = weights.k.shape[0], weights.layout.rotary_dim, weights.layout.rotary_dim // 2
    moment, count = problem.statistics.inputs.to(torch.complex128), len(rope_frequencies)
    rest = to_planes(weights.k, rotary)
    rotary_rows, rotary_maps = [], rest.new_zeros(groups, half, count)
    for i, (block, _) in enumerate(folded_blocks(problem.frequencies, rope_frequencies, folding)):
        stack = rest[:, block].flatten(0, 1)
        top = torch.linalg.eigh((stack @ moment @ stack.mH).real)[1][:, -1].to(torch.complex128)
        rotary_rows.append(top @ stack)
        rotary_maps[:, block, i] = top.unflatten(0, (groups, -1))
        rest[:, block] = (stack - top[:, None] * rotary_rows[-1]).unflatten(0, (groups, -1))
    position_free = torch.cat([from_planes(rest), weights.k[:, rotary:]], 1)
    latent, k_up, v_up = joint_low_rank(position_free, weights.v, problem.rank, problem.statistics)
    features = Features(torch.stack(rotary_rows), rope_frequencies, latent)
    readout = problem.objective.solve_readout(features, _key_maps(weights, rotary_maps, k_up), v_up)
    return LatentSolution(features, readout, folding)


def _key_maps(weights: LayerWeights, rotary_maps: Tensor, k_up: Tensor) -> Tensor:
    """Return the key part of a readout (H, key rows, features).

    The key part combines rotary maps (G, F, P / 2) with latent maps (G, d, R).
    """
    latent = conjugate_pairs(k_up, weights.layout.rotary_dim)
    none = torch.zeros_like(rotary_maps)
    rotary = torch.cat([torch.cat([rotary_maps, none], 2), torch.cat([none, rotary_maps.conj()], 2)], 1)
    free = rotary_maps.new_zeros(len(rotary_maps), latent.shape[1] - rotary.shape[1], rotary.shape[2])
    keys = torch.cat([torch.cat([rotary, free], 1), latent], 2)
    return keys.repeat_interleave(weights.layout.queries_per_group, 0)
