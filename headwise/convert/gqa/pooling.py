"""Pool heads: one of the checkpoint's own heads, or their mean, for every group.

A merge method that needs no moments (registry.py) is a pure function `(heads, groups, seed) -> pooled` of one
tensor. It leaves queries and outputs as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PoolingMethod = Callable[[Tensor, Sequence[Sequence[int]], int], Tensor]


def mean_head(heads: Tensor, groups: Sequence[Sequence[int]], seed: int = 0) -> Tensor:
    """Average the heads of every group (Ainslie et al. 2023, arXiv 2305.13245).

    Args:
        heads: (G, ...), a layer's key rows, value rows, biases or norm weights, in any floating dtype.
        groups: the members of each new head, as indices of `heads`.
        seed: not used.

    Returns:
        (groups, ...), float64.
    """
    pooled = torch.zeros(len(groups), *heads.shape[1:], dtype=torch.float64, device=heads.device)
    for mean, group in zip(pooled, groups, strict=True):
        for j in group:
            mean += heads[j]
    return pooled.div_(len(groups[0]))


def first_head(heads: Tensor, groups: Sequence[Sequence[int]], seed: int = 0) -> Tensor:
    """Take the first head of every group.

    Args:
        heads: (G, ...), a layer's key rows, value rows, biases or norm weights, in any floating dtype.
        groups: the members of each new head, as indices of `heads`.
        seed: not used.

    Returns:
        (groups, ...), float64.
    """
    return heads[[group[0] for group in groups]].to(torch.float64)


def random_head(heads: Tensor, groups: Sequence[Sequence[int]], seed: int = 0) -> Tensor:
    """Take a random head of every group.

    Args:
        heads: (G, ...), a layer's key rows, value rows, biases or norm weights, in any floating dtype.
        groups: the members of each new head, as indices of `heads`.
        seed: decides which head; the same seed takes the same heads of keys and of values.

    Returns:
        (groups, ...), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(groups[0]), (len(groups),), generator=generator, device="cpu").tolist()
    return heads[[group[pick] for group, pick in zip(groups, picks, strict=True)]].to(torch.float64)
