"""The bound on the RoPE base for a context, and the rule to choose by it (mathematics, section 5).

Frequencies hold for a context if `B(m)` is not negative for any distance m within it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.models import rope

# The first number of distances that `first_failure` computes at once, and the largest.
FIRST_BLOCK, LARGEST_BLOCK = 4096, 1 << 20
# Relative step between bases, and the same for contexts beyond LONG_CONTEXT, where a small step is slow.
RESOLUTION, COARSE_RESOLUTION, LONG_CONTEXT = 0.01, 0.03, 65_536


def similarity(frequencies: Tensor, length: int, start: int = 0) -> Tensor:
    """Return `B(m) = sum_f cos(m w_f)`: by how much the score of a similar key exceeds that of a random key.

    The key is m tokens away. With m = a + j, a cosine of a sum is a product, so the whole curve is one matrix
    product of two tables of about sqrt(length) rows.

    Args:
        frequencies: (planes,) radians per token.
        length: the last distance, in tokens.
        start: the first distance.

    Returns:
        (length - start + 1,) float64 (Men et al. 2024, arXiv 2405.14591).
    """
    count = length - start + 1
    step = math.isqrt(count) + 1
    steps = torch.arange(start, length + 1, step, dtype=torch.float64)
    coarse = torch.outer(steps, frequencies.double())
    fine = torch.outer(torch.arange(step, dtype=torch.float64), frequencies.double())
    left = torch.cat([coarse.cos(), -coarse.sin()], dim=1)
    return (left @ torch.cat([fine.cos(), fine.sin()], dim=1).T).flatten()[:count]


def first_failure(frequencies: Tensor, length: int) -> int | None:
    """Return the first distance up to `length` with `B(m) < 0`; None if the frequencies hold.

    Args:
        frequencies: (planes,) radians per token.
        length: the last distance, in tokens.
    """
    start, block = 0, FIRST_BLOCK
    while start <= length:
        end = min(start + block - 1, length)
        negative = (similarity(frequencies, end, start) < 0).nonzero()
        if len(negative):
            return start + int(negative[0])
        start, block = end + 1, min(2 * block, LARGEST_BLOCK)
    return None


@dataclass(frozen=True)
class SmallestBase:
    """Bases that hold for a context. Between the first two some hold and some fail: validity is not monotone.

    Attributes:
        smallest: the smallest base on the grid that holds.
        always_from: the base from which every base on the grid up to `searched` holds.
        searched: the largest base tried.
        resolution: the relative step of the grid.
    """

    smallest: float
    always_from: float
    searched: float
    resolution: float


def smallest_base(
    rotary_dim: int, length: int, resolution: float | None = None, beyond: float = 10
) -> SmallestBase:
    """Search a geometric grid of bases, from 10 upwards, for those that hold for `length`.

    Args:
        rotary_dim: rotary dimensions of a head. With 2 no base holds, and all bases of the result are infinite.
        length: the context, in tokens.
        resolution: the grid's relative step; None: 1%, or 3% for a context beyond 65,536. A base that holds only
            between two grid points is missed.
        beyond: the search ends at this multiple of the last base that fails.
    """
    resolution = resolution or (RESOLUTION if length <= LONG_CONTEXT else COARSE_RESOLUTION)
    if rotary_dim < 4:
        return SmallestBase(math.inf, math.inf, math.inf, resolution)
    exponent = math.ceil(math.log(10) / math.log1p(resolution))
    smallest = always_from = None
    while True:
        base = (1 + resolution) ** exponent
        if first_failure(rope.base_frequencies(base, rotary_dim), length) is not None:
            always_from = None
        else:
            smallest, always_from = smallest or base, always_from or base
            if base > beyond * always_from:
                return SmallestBase(smallest, always_from, base, resolution)
        exponent += 1


def never_turned(frequencies: Tensor, trained: int) -> float:
    """Return the fraction of planes without one full turn within the trained context.

    Such planes get new angles beyond it.

    Args:
        frequencies: (planes,) radians per token.
        trained: the trained context, in tokens.
    """
    return float((frequencies * trained < 2 * math.pi).double().mean())


@dataclass(frozen=True)
class Recommendation:
    """A RoPE rule, and why.

    Attributes:
        rule: the name of the rule in the registry.
        reason: one clause.
    """

    rule: str
    reason: str


def recommend_rule(parameters: rope.Parameters, *, rotary_dim: int, trained: int) -> Recommendation:
    """Choose the RoPE rule for a model's rotary width and trained context, whether or not training follows.

    YaRN came out best of all rules both without training and after it (docs/results/long-context.md).

    Args:
        parameters: transformers 5 `rope_parameters` of the source.
        rotary_dim: rotary dimensions of a head.
        trained: the trained context, in tokens.
    """
    source = rope.rope_type(parameters)
    if source in ("yarn", "llama3", "longrope"):
        return Recommendation(source, f"the source already scales by {source}, and only {source} composes exactly")
    if source == "linear":
        return Recommendation("ntk", "on a linearly scaled source a larger base composes exactly")
    turned = 1 - never_turned(rope.base_frequencies(parameters["rope_theta"], rotary_dim), trained)
    return Recommendation(
        "yarn",
        f"no plane should get an angle that it was not trained on. Of the {turned:.0%} of planes that completed a "
        f"turn in {trained} tokens yarn keeps the fast ones, and it slows the others",
    )
