"""Random layers for the MLA conversion, and attention written out for source and converted layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headwise.convert.mla.latent import LatentReport, approximate_mla
from headwise.models import deepseek
from headwise.models.layout import AttentionLayout, LatentWeights, LayerWeights

THETA = 100.0


def random_source(
    heads: int,
    groups: int,
    head_dim: int,
    hidden: int,
    *,
    rotary: int | None = None,
    bias: bool = False,
    seed: int = 0,
) -> tuple[LayerWeights, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rotary = head_dim if rotary is None else rotary
    inputs = hidden + bias

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(hidden)

    layout = AttentionLayout(heads, groups, head_dim, head_dim, rotary)
    weights = LayerWeights(
        layout,
        2 * random(heads, head_dim, inputs),
        2 * random(groups, head_dim, inputs),
        random(groups, head_dim, inputs),
        random(heads, hidden, head_dim),
    )
    return weights, deepseek.default_grid(THETA, rotary) if rotary else torch.ones(4, dtype=torch.float64)


def moment(hidden: int, seed: int = 1) -> Tensor:
    """E[x x^T] with correlated inputs, a mean, and the constant 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, hidden, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.1, hidden) + 0.2
    x = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    return x.T @ x / 400


def rotate(vectors: Tensor, frequencies: Tensor) -> Tensor:
    """(..., tokens, 2F) half-split vectors turned by their position."""
    angles = torch.arange(vectors.shape[-2], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(*vectors.chunk(2, -1)) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], -1)


def attend(scores: Tensor, values: Tensor, o: Tensor) -> Tensor:
    length = scores.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("hij,hjv,hDv->iD", scores.masked_fill(mask, -torch.inf).softmax(-1), values, o)


def run_source(weights: LayerWeights, frequencies: Tensor, x: Tensor, scale: float) -> Tensor:
    layout, r = weights.layout, weights.layout.rotary_dim
    q, k, v = (torch.einsum("hdi,ti->htd", w, x) for w in (weights.q, weights.k, weights.v))
    if r:
        q = torch.cat([rotate(q[..., :r], frequencies), q[..., r:]], -1)
        k = torch.cat([rotate(k[..., :r], frequencies), k[..., r:]], -1)
    k, v = (t.repeat_interleave(layout.queries_per_group, 0) for t in (k, v))
    return attend(scale * q @ k.mT, v, weights.o)


def run_latent(layer: LatentWeights, x: Tensor) -> Tensor:
    c = x @ layer.kv_down.T
    rotary = rotate(torch.einsum("hdi,ti->htd", layer.q_rope, x), layer.frequencies)
    key = rotate(x @ layer.k_rope.T, layer.frequencies)
    nope = torch.einsum("hdi,ti->htd", layer.q_nope, x) @ (layer.k_up @ c.T)
    return attend(layer.scale * (nope + rotary @ key.T), c @ layer.v_up.mT, layer.o)


def tokens(hidden: int, bias: bool, length: int = 12, seed: int = 2) -> Tensor:
    x = torch.randn(length, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([x, torch.ones(length, 1, dtype=torch.float64)], 1) if bias else x


def approximate(
    weights: LayerWeights, frequencies: Tensor, rank: int, rope: int | Tensor, **options: Any
) -> tuple[LatentWeights, LatentReport]:
    rope = deepseek.default_grid(THETA, rope) if isinstance(rope, int) else rope
    options = {"moment": moment(weights.hidden_size), "scale": weights.layout.head_dim**-0.5, **options}
    return approximate_mla(weights, frequencies, rank=rank, rope_frequencies=rope, **options)
