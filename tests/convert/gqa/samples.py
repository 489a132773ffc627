"""Random layers with correlated inputs, and changes of coordinates that no output depends on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from headwise.models.layout import LayerWeights, from_planes, to_planes

SHAPES = [  # heads, key-value heads, head_dim, rotary_dim, hidden size, bias
    (8, 8, 16, 16, 48, False),
    (9, 9, 8, 8, 36, True),
    (14, 14, 8, 4, 40, False),
    (28, 4, 8, 0, 32, True),
    (8, 4, 12, 6, 20, False),
]


def inputs_like(weights: LayerWeights, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(weights.hidden_size, weights.hidden_size, generator=g, dtype=torch.float64)
    inputs = torch.randn(tokens, weights.hidden_size, generator=g, dtype=torch.float64)
    return inputs @ mix / math.sqrt(weights.hidden_size)


def moment_of(weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
    if weights.has_bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    moment: torch.Tensor = x.mT @ x / len(x)
    return moment


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gauge(weights: LayerWeights, seed: int = 3) -> LayerWeights:
    """A random change of coordinates in every head that keeps all logits (mathematics, section 1)."""
    g = torch.Generator().manual_seed(seed)
    layout, r = weights.layout, weights.layout.rotary_dim
    reads = layout.queries_per_group
    scalar = torch.randn(layout.num_key_value_heads, r // 2, 1, generator=g, dtype=torch.complex128) + 0.1
    free = layout.head_dim - r
    m = torch.randn(layout.num_key_value_heads, free, free, generator=g, dtype=torch.float64)
    w = torch.randn(layout.num_key_value_heads, layout.v_head_dim, layout.v_head_dim, generator=g).double()

    def expand(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(reads, 0)

    q_rotary = from_planes(to_planes(weights.q, r) / expand(scalar).conj())
    return replace(
        weights,
        k=torch.cat([from_planes(scalar * to_planes(weights.k, r)), m @ weights.k[:, r:]], 1),
        q=torch.cat([q_rotary, expand(m.inverse()).mT @ weights.q[:, r:]], 1),
        v=w @ weights.v,
        o=weights.o @ expand(w.inverse()),
    )
