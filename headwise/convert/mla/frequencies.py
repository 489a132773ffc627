"""Choose the frequencies of an MLA model's rotary key from its source's, one list for all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.convert.mla.components import plane_energy, query_energy
from headwise.convert.mla.features import LayerStatistics, mean_phase
from headwise.models.layout import LayerWeights, to_planes


def partial_frequencies(
    frequencies: Tensor, num_key_value_heads: int, rope_dim: int, planes_kept: str, norms: Tensor
) -> Tensor:
    """Return the frequencies that partial RoPE keeps, each once per KV head.

    Args:
        frequencies: (F,) radians per token of the source's planes, falling.
        num_key_value_heads: KV heads of the source.
        rope_dim: width of the MLA model's rotary key.
        planes_kept: "high", "low", "uniform" (by frequency) or "norm" (by 2-norm).
        norms: (F,) `plane_norms`, summed over layers; used by "norm" only.

    Returns:
        (rope_dim / 2,) radians per token.

    Raises:
        ValueError: `rope_dim` does not give every head the same number of planes, or more than it has.
    """
    count, left = divmod(rope_dim // 2, num_key_value_heads)
    total = len(frequencies)
    if left or not 0 < count <= total:
        step = 2 * num_key_value_heads
        raise ValueError(
            f"partial RoPE of {num_key_value_heads} KV heads needs a rope_dim that is a multiple of {step} and at "
            f"most {step * total}"
        )
    first = torch.arange(count, device=norms.device)
    kept = {
        "high": first,
        "low": total - count + first,
        "uniform": first * total // count,
        "norm": norms.topk(count).indices.sort().values,
    }[planes_kept]
    return frequencies[kept].repeat_interleave(num_key_value_heads)


def plane_norms(weights: LayerWeights, statistics: LayerStatistics) -> Tensor:
    """Return the 2-norm that bounds a plane's share of the scores: |q_f| |k_f|, summed over query heads, (F,).

    Args:
        weights: the source layer, float64, with an input column for the constant.
        statistics: of the attention inputs.
    """
    key = plane_energy(to_planes(weights.k, weights.layout.rotary_dim), statistics)
    query = plane_energy(to_planes(weights.q, weights.layout.rotary_dim), statistics)
    return (query.sqrt() * key.sqrt().repeat_interleave(weights.layout.queries_per_group, 0)).sum(0)


def rotary_gains(weights: LayerWeights, frequencies: Tensor, statistics: LayerStatistics) -> Tensor:
    """Return the score energy that each component at a frequency would lose by becoming position-free.

    Args:
        weights: the source layer, float64, with an input column for the constant.
        frequencies: (F,) radians per token of its planes.
        statistics: of the attention inputs.

    Returns:
        (F, G), falling along the components.
    """
    energy = query_energy(weights, statistics)
    scaled = energy.sqrt()[:, :, None] * to_planes(weights.k, weights.layout.rotary_dim)
    stack = scaled.transpose(0, 1)
    energies = torch.linalg.eigvalsh(stack @ statistics.inputs.to(torch.complex128) @ stack.mH).flip(1)
    kept = mean_phase(statistics.distances.mean(0), frequencies).abs().square()
    gains: Tensor = energies * (1 - kept)[:, None]
    return gains


def free_frequencies(frequencies: Tensor, gains: Tensor, rope_dim: int) -> Tensor:
    """Return the source frequencies whose components lose most, repeated where several components do.

    Args:
        frequencies: (F,) radians per token of the source's planes.
        gains: (F, G) `rotary_gains`, summed over layers.
        rope_dim: width of the MLA model's rotary key.

    Returns:
        (rope_dim / 2,) radians per token, falling.
    """
    best = gains.flatten().topk(min(rope_dim // 2, gains.numel())).indices // gains.shape[1]
    chosen = frequencies[best].sort(descending=True).values
    return torch.cat([chosen, chosen[-1:].repeat(rope_dim // 2 - len(chosen))])
