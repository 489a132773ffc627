"""An attention layer written down once more, plainly and in float64: what `LayerWeights` means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headwise.models.layout import AttentionLayout, LayerWeights


def frequencies(rotary_dim: int, theta: float = 10000.0) -> Tensor:
    return theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1))


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """x (heads, tokens, head_dim): turn the first 2 len(freqs) dims, half-split."""
    half = len(freqs)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * freqs
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def normalise(x: Tensor, weight: Tensor | None, scope: str | None, eps: float = 1e-6) -> Tensor:
    """RMSNorm of x (heads, tokens, head_dim) over one head or over all."""
    if weight is None:
        return x
    square = x.square().mean(-1, keepdim=True)
    if scope == "all":
        square = square.mean(0, keepdim=True)
    return x * (square + eps).rsqrt() * weight[:, None]


def attend(weights: LayerWeights, x: Tensor, freqs: Tensor) -> Tensor:
    """Causal attention output (tokens, D) for inputs x (tokens, D)."""
    layout = weights.layout
    if weights.has_bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
    q = rotate(normalise(x @ weights.q.mT, weights.q_norm, weights.norm_scope), freqs)
    k = rotate(normalise(x @ weights.k.mT, weights.k_norm, weights.norm_scope), freqs)
    k = k.repeat_interleave(layout.queries_per_group, 0)
    v = (x @ weights.v.mT).repeat_interleave(layout.queries_per_group, 0)
    scores = q @ k.mT / layout.head_dim**0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    attended: Tensor = torch.einsum("htv,hdv->td", p @ v, weights.o)
    return attended


def random_layer(
    heads: int,
    groups: int,
    head_dim: int,
    hidden_size: int,
    *,
    rotary_dim: int | None = None,
    bias: bool = False,
    norm_scope: str | None = None,
    seed: int = 0,
) -> LayerWeights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) / math.sqrt(shape[-1])

    rotary = head_dim if rotary_dim is None else rotary_dim
    inputs = hidden_size + bias
    layout = AttentionLayout(heads, groups, head_dim, head_dim, rotary)
    norms: dict[str, Any] = {}
    if norm_scope:
        q_norm = 1 + 0.3 * torch.randn(heads if norm_scope == "all" else 1, head_dim, generator=g).double()
        k_norm = 1 + 0.3 * torch.randn(groups if norm_scope == "all" else 1, head_dim, generator=g).double()
        norms = {
            "q_norm": q_norm.expand(heads, head_dim).clone(),
            "k_norm": k_norm.expand(groups, head_dim).clone(),
            "norm_scope": norm_scope,
        }
    return LayerWeights(
        layout,
        q=draw(heads, head_dim, inputs),
        k=draw(groups, head_dim, inputs),
        v=draw(groups, head_dim, inputs),
        o=draw(heads, hidden_size, head_dim),
        **norms,
    )
