"""Compute the attention entropy of every query head and find the heads where child and parent differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative entropy (0 to 1). Below the first bound a head attends to almost one token; above the second it attends
# to all tokens almost equally.
COLLAPSED_BELOW, UNIFORM_ABOVE = 0.02, 0.98
CHANGED_BY = 0.1
# The first queries have few keys, so every head has a low entropy there.
SKIPPED_QUERIES = 16


@dataclass(frozen=True)
class HeadIndex:
    """The place of a query head in a model."""

    layer: int
    head: int


@dataclass(frozen=True)
class AttentionEntropy:
    """Relative attention entropy of every query head: 0 for attention to one token, 1 for uniform attention.

    Attributes:
        child: entropies of the child, (layers, heads).
        parent: entropies of the parent, (layers, heads).
        collapsed: heads of the child below `collapsed_below` where the parent's head is not.
        uniform: heads of the child above `uniform_above` where the parent's head is not.
        parent_collapsed: heads of the parent below `collapsed_below`.
        parent_uniform: heads of the parent above `uniform_above`.
        changed: heads whose entropy differs by more than `changed_by`.
        collapsed_below: bound of a collapsed head.
        uniform_above: bound of a uniform head.
        changed_by: bound of a changed head.
    """

    child: tuple[tuple[float, ...], ...]
    parent: tuple[tuple[float, ...], ...]
    collapsed: tuple[HeadIndex, ...]
    uniform: tuple[HeadIndex, ...]
    parent_collapsed: tuple[HeadIndex, ...]
    parent_uniform: tuple[HeadIndex, ...]
    changed: tuple[HeadIndex, ...]
    collapsed_below: float
    uniform_above: float
    changed_by: float


def relative_entropy(weights: Tensor) -> Tensor:
    """Compute the mean attention entropy of each head, relative to its maximum.

    Args:
        weights: attention probabilities, (heads, queries, keys), causal.

    Returns:
        (heads,): the mean over queries of H(p) / ln(number of visible keys). The first queries are left out because
        they have few keys.
    """
    weights = weights.double()
    length = weights.shape[-1]
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    # With a sliding window fewer keys are visible than precede the query.
    visible = torch.arange(1, length + 1, device=weights.device).minimum((weights > 0).any(0).sum(-1).clamp_min(2))
    start = min(SKIPPED_QUERIES, length // 2)
    relative: Tensor = (entropy / visible.double().log().clamp_min(math.log(2)))[:, start:].mean(-1)
    return relative


def compare_entropy(child: Tensor, parent: Tensor) -> AttentionEntropy:
    """Find collapsed, uniform and changed heads.

    Args:
        child: relative entropies of the child, (layers, heads).
        parent: relative entropies of the parent, (layers, heads).

    Returns:
        Both entropies and the lists of heads.
    """
    return AttentionEntropy(
        child=tuple(map(tuple, child.tolist())),
        parent=tuple(map(tuple, parent.tolist())),
        collapsed=_heads((child < COLLAPSED_BELOW) & (parent >= COLLAPSED_BELOW)),
        uniform=_heads((child > UNIFORM_ABOVE) & (parent <= UNIFORM_ABOVE)),
        parent_collapsed=_heads(parent < COLLAPSED_BELOW),
        parent_uniform=_heads(parent > UNIFORM_ABOVE),
        changed=_heads((child - parent).abs() > CHANGED_BY),
        collapsed_below=COLLAPSED_BELOW,
        uniform_above=UNIFORM_ABOVE,
        changed_by=CHANGED_BY,
    )


def _heads(mask: Tensor) -> tuple[HeadIndex, ...]:
    return tuple(HeadIndex(layer, head) for layer, head in mask.nonzero().tolist())
