"""Components of the keys that all heads share at a frequency, and the joint low rank of what is left of them and
the values: where the conversion starts, and the published methods it is compared with (mathematics, section 4).

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.convert.gqa.methods import leading
from headwise.convert.mla.alternating import Features, Statistics, conjugate_pairs, turn
from headwise.models.layout import LayerWeights, planes, rows


def seed(
    weights: LayerWeights,
    frequencies: Tensor,
    rope_frequencies: Tensor,
    rank: int,
    known: Statistics,
    folding: int,
) -> Features:
    """Score-weighted complex components, one per rotary plane of the MLA model, and the joint low rank.

    At each frequency the rows of all heads are scaled by the root of the energy of the queries that read them.
    A plane of the new model takes the top component of the `folding` neighbouring frequencies around its own,
    each counted by how well the plane's frequency stands for it, `m_f = E[e^{-i (w_f - w) D}]`; what it took is
    removed. The rest becomes position-free, counted by `m_f = E[e^{-i w_f D}]`.
    """
    rotary, shape = weights.layout.rotary_dim, weights.k.shape
    rest = weights.k.clone()
    turning = rest.new_zeros(len(rope_frequencies), shape[2], dtype=torch.complex128)
    if rotary:
        energy = query_energy(weights, known).sqrt()[:, :, None].clamp_min(1e-150)
        scaled, seen = (energy * planes(k, rotary) for k in (weights.k, weights.k @ known.inputs))
        mean = known.distances.mean(0)
        for i, (block, frequency) in enumerate(_blocks(frequencies, rope_frequencies, folding)):
            stands = mean_phase(mean, frequencies[block] - frequency).repeat(shape[0])
            stack, moment = scaled[:, block].flatten(0, 1), seen[:, block].flatten(0, 1)
            gram = (stands[:, None] * moment) @ (stands[:, None] * stack).mH
            top = stands.conj() * torch.linalg.eigh(gram)[1][:, -1]
            top = top / top.norm().clamp_min(1e-150)
            turning[i] = top.conj() @ stack
            for every, part in ((scaled, stack), (seen, moment)):
                every[:, block] = (part - top[:, None] * (top.conj() @ part)).unflatten(0, (shape[0], -1))
        m = mean_phase(mean, frequencies[: rotary // 2]).abs()[:, None]
        rest[:, :rotary] = rows(m * scaled)
        free = weights.q[:, rotary:]
        free_energy = torch.einsum("hfi,ij,hfj->hf", free, known.inputs, free)
        rest[:, rotary:] *= free_energy.unflatten(0, (shape[0], -1)).sum(1).sqrt()[:, :, None]
    output = torch.einsum("hia,hib->hab", weights.o, weights.o).unflatten(0, (shape[0], -1)).sum(1)
    latent, _, _ = joint_low_rank(rest, square_root(output) @ weights.v, rank, known)
    return Features(turning, rope_frequencies, latent)


def transmla(
    weights: LayerWeights,
    frequencies: Tensor,
    rope_frequencies: Tensor,
    rank: int,
    known: Statistics,
    folding: int,
) -> tuple[Features, Tensor, Tensor]:
    """TransMLA's RoRoPE, FreqFold and balanced joint PCA (Meng et al. 2025, arXiv 2502.07864, sections 4.2-4.4).

    The real part of the components' moment, energies of keys alone, and position-free keys as if they had
    never turned. Returns features, and the readings of keys (H, rows, features) and values (G, width, rank).
    """
    groups, rotary, half = weights.k.shape[0], weights.layout.rotary_dim, weights.layout.rotary_dim // 2
    moment, count = known.inputs.to(torch.complex128), len(rope_frequencies)
    rest = planes(weights.k, rotary)
    turning, taken = [], rest.new_zeros(groups, half, count)
    for i, (block, _) in enumerate(_blocks(frequencies, rope_frequencies, folding)):
        stack = rest[:, block].flatten(0, 1)
        top = torch.linalg.eigh((stack @ moment @ stack.mH).real)[1][:, -1].to(torch.complex128)
        turning.append(top @ stack)
        taken[:, block, i] = top.unflatten(0, (groups, -1))
        rest[:, block] = (stack - top[:, None] * turning[-1]).unflatten(0, (groups, -1))
    position_free = torch.cat([rows(rest), weights.k[:, rotary:]], 1)
    latent, k_up, v_up = joint_low_rank(position_free, weights.v, rank, known)
    features = Features(torch.stack(turning), rope_frequencies, latent)
    return features, _key_readings(weights, taken, k_up), v_up


def partial_rope(
    weights: LayerWeights, frequencies: Tensor, rope_frequencies: Tensor, rank: int, known: Statistics
) -> tuple[Features, Tensor, Tensor]:
    """MHA2MLA's partial RoPE with joint SVD (Ji et al. 2025, arXiv 2502.14837, section 3).

    Every head keeps the same planes (`partial_frequencies` chooses them), each in a rotary plane of its own; the
    others become position-free as if they had never turned.
    """
    groups, rotary, half = weights.k.shape[0], weights.layout.rotary_dim, weights.layout.rotary_dim // 2
    kept = [int((frequencies - w).abs().argmin()) for w in rope_frequencies[::groups]]
    keys = planes(weights.k, rotary)
    turning = keys[:, kept].transpose(0, 1).flatten(0, 1)
    taken = keys.new_zeros(groups, half, len(rope_frequencies))
    for j, f in enumerate(kept):
        for g in range(groups):
            taken[g, f, j * groups + g] = 1
    rest = keys.clone()
    rest[:, kept] = 0
    position_free = torch.cat([rows(rest), weights.k[:, rotary:]], 1)
    latent, k_up, v_up = joint_low_rank(position_free, weights.v, rank, known, balance=False)
    return Features(turning, rope_frequencies, latent), _key_readings(weights, taken, k_up), v_up


def partial_frequencies(frequencies: Tensor, groups: int, rope_dim: int, choice: str, norms: Tensor) -> Tensor:
    """(rope_dim / 2,) the frequencies `partial_rope` keeps, each `groups` times: "high", "low", "uniform", "norm".

    Args:
        norms: (F,) see `plane_norms`, summed over layers; only "norm" reads them.

    Raises:
        ValueError: `rope_dim` does not give every head the same number of planes, or more than it has.
    """
    count, left = divmod(rope_dim // 2, groups)
    total = len(frequencies)
    if left or not 0 < count <= total:
        raise ValueError(f"partial RoPE of {groups} KV heads needs a rope_dim that is a multiple of {2 * groups}")
    first = torch.arange(count, device=norms.device)
    picks = {
        "high": first,
        "low": total - count + first,
        "uniform": first * total // count,
        "norm": norms.topk(count).indices.sort().values,
    }[choice]
    return frequencies[picks].repeat_interleave(groups)


def plane_norms(weights: LayerWeights, known: Statistics) -> Tensor:
    """(F,) the 2-norm that bounds a plane's share of the scores: |q_f| |k_f|, summed over query heads."""
    key = _energy(planes(weights.k, weights.layout.rotary_dim), known)
    query = _energy(planes(weights.q, weights.layout.rotary_dim), known)
    return (query.sqrt() * key.sqrt().repeat_interleave(weights.layout.queries_per_group, 0)).sum(0)


def rotary_gains(weights: LayerWeights, frequencies: Tensor, known: Statistics) -> Tensor:
    """(F, G): what each component at a frequency would lose by becoming position-free, largest first."""
    scaled = query_energy(weights, known).sqrt()[:, :, None] * planes(weights.k, weights.layout.rotary_dim)
    stack = scaled.transpose(0, 1)
    energies = torch.linalg.eigvalsh(stack @ known.inputs.to(torch.complex128) @ stack.mH).flip(1)
    return energies * (1 - mean_phase(known.distances.mean(0), frequencies).abs().square())[:, None]


def free_frequencies(frequencies: Tensor, gains: Tensor, rope_dim: int) -> Tensor:
    """(rope_dim / 2,) the source frequencies whose components lose most, repeated where several do.

    Args:
        gains: (F, G) `rotary_gains` summed over the layers, which share one list.
    """
    best = gains.flatten().topk(min(rope_dim // 2, gains.numel())).indices // gains.shape[1]
    chosen = frequencies[best].sort(descending=True).values
    return torch.cat([chosen, chosen[-1:].repeat(rope_dim // 2 - len(chosen))])


def joint_low_rank(
    keys: Tensor, values: Tensor, rank: int, known: Statistics, balance: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Top components of position-free keys and values together.

    Args:
        keys: (G, d, n) and values (G, v, n), scaled by what an error in them costs.
        balance: bring keys to the energy of the values first.

    Returns:
        latent (rank, n), and the maps that give keys (G, d, rank) and values (G, v, rank) back from it.
    """
    groups, width = keys.shape[0], keys.shape[1]
    k, v = keys.flatten(0, 1), values.flatten(0, 1)
    k_seen, v_seen = k @ known.inputs, v @ known.inputs
    k_energy, v_energy = float((k_seen * k).sum()), float((v_seen * v).sum())
    alpha = (v_energy / k_energy) ** 0.5 if balance and k_energy > 0 else 1.0
    stack, seen = torch.cat([alpha * k, v]), torch.cat([alpha * k_seen, v_seen])
    basis = leading(seen, min(rank, len(stack)), stack.T)[1]
    basis = torch.nn.functional.pad(basis, (0, rank - basis.shape[1]))
    k_up, v_up = basis[: groups * width] / alpha, basis[groups * width :]
    return basis.T @ stack, k_up.unflatten(0, (groups, width)), v_up.unflatten(0, (groups, -1))


def mean_phase(distances: Tensor, frequencies: Tensor) -> Tensor:
    """m = E[e^{-i w D}] (frequencies,) over distances with the given weights (length,)."""
    return turn(frequencies, len(distances)) @ distances.to(torch.complex128)


def query_energy(weights: LayerWeights, known: Statistics) -> Tensor:
    """(G, F): E|q_f|^2, summed over the query heads of each KV head."""
    energy = _energy(planes(weights.q, weights.layout.rotary_dim), known)
    return energy.unflatten(0, (weights.layout.num_key_value_heads, -1)).sum(1)


def square_root(matrices: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mH


def _energy(stack: Tensor, known: Statistics) -> Tensor:
    return ((stack @ known.inputs.to(torch.complex128)) * stack.conj()).sum(-1).real


def _blocks(frequencies: Tensor, rope_frequencies: Tensor, folding: int) -> Sequence[tuple[list[int], Tensor]]:
    """For each rotary plane of the MLA model: the source frequencies it may stand for, and its own."""
    nearest = (frequencies.log() - rope_frequencies.log()[:, None]).abs().argmin(1) // folding
    count = len(frequencies)
    return [
        (list(range(j * folding, min((j + 1) * folding, count))), w)
        for j, w in zip(nearest.tolist(), rope_frequencies, strict=True)
    ]


def _key_readings(weights: LayerWeights, taken: Tensor, k_up: Tensor) -> Tensor:
    """Readings (H, key rows, features) from rotary parts (G, F, P / 2) and position-free ones (G, d, R)."""
    latent = conjugate_pairs(k_up, weights.layout.rotary_dim)
    none = torch.zeros_like(taken)
    turning = torch.cat([torch.cat([taken, none], 2), torch.cat([none, taken.conj()], 2)], 1)
    free = taken.new_zeros(len(taken), latent.shape[1] - turning.shape[1], turning.shape[2])
    readings = torch.cat([torch.cat([turning, free], 1), latent], 2)
    return readings.repeat_interleave(weights.layout.queries_per_group, 0)
