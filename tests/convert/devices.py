"""Layers, statistics and comparisons for the tests of closed forms on other devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.convert.verify.factored import latent_attention
from headwise.models.layout import LayerWeights
from tests.reference import attend, frequencies, random_layer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


SHAPES = [  # heads, key-value heads, head_dim, rotary_dim, hidden size, bias
    (9, 9, 64, 32, 40, True),  # enough rows of keys and values for subspace iteration
    (14, 2, 8, 8, 36, False),
    (14, 14, 8, 4, 44, True),
]


def sample_layer(shape: tuple[int, int, int, int, int, bool], **more: Any) -> LayerWeights:
    num_heads, groups, head_dim, rotary, hidden, bias = shape
    return random_layer(num_heads, groups, head_dim, hidden, rotary_dim=rotary, bias=bias, **more)


def tokens(weights: LayerWeights, count: int = 200, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, weights.hidden_size, generator=g).double() * torch.linspace(
        2, 0.2, weights.hidden_size
    )


def moments(weights: LayerWeights) -> dict[str, Tensor]:
    """Moments of tokens, of every second one, and of means of two; random attention distances of every head."""
    x = torch.nn.functional.pad(tokens(weights), (0, 1), value=1.0)
    attended, read = x[::2], (x[::2] + x[1::2]) / 2
    found = {"moment": x, "key_moment": attended, "value_moment": read}
    weight = torch.rand(weights.layout.num_attention_heads, 32, generator=torch.Generator().manual_seed(2)).double()
    return {n: y.T @ y / len(y) for n, y in found.items()} | {"distances": weight / weight.sum(1, keepdim=True)}


def on(device: str, given: dict[str, Any]) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in given.items()}


def difference(ours: Any, theirs: Any, weights: LayerWeights) -> float:
    """The relative difference between the outputs of two conversions of a layer."""
    x = tokens(weights, 24, seed=3)
    if isinstance(ours, LayerWeights):
        a, b = (attend(layer, x, frequencies(weights.layout.rotary_dim)) for layer in (ours, theirs))
    else:
        a, b = (latent_attention(layer, x[None]) for layer in (ours, theirs))
    return float((a - b).norm() / b.norm())


# As the default device: a tensor created without a device holds no data then, and an operation with one that does
# fails or gives another result.
META = torch.device("meta")
