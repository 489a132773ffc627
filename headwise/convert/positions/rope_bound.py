"""How far frequencies reach: the bound on the base, and the rule to choose by it (mathematics, section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.models import rope


def similarity(frequencies: Tensor, length: int, start: int = 0) -> Tensor:
    """`B(m) = sum_f cos(m w_f)`, how much more a query favours a similar key than a random one m tokens away.

    With m = a + j, a cosine of a sum is a product, so the whole curve is one matrix product of two tables of
    about sqrt(length) rows.

    Args:
        frequencies: (planes,) radians per token.
        length: the last distance.
        start: the first one.

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
    """The first distance up to `length` with `B(m) < 0`, or None: the frequencies reach that far."""
    start, block = 0, 4096
    while start <= length:
        end = min(start + block - 1, length)
        negative = (similarity(frequencies, end, start) < 0).nonzero()
        if len(negative):
            return start + int(negative[0])
        start, block = end + 1, min(2 * block, 1 << 20)
    return None


@dataclass(frozen=True)
class SmallestBase:
    """`smallest`: the least base on the grid that holds; `always`: from here on every one up to `searched` does.

    Between the two some bases hold and some fail: validity is not monotone in the base.
    """

    smallest: float
    always: float
    searched: float
    resolution: float


def smallest_base(
    rotary_dim: int, length: int, resolution: float | None = None, beyond: float = 10
) -> SmallestBase:
    """Search a geometric grid of bases, from 10 upwards, for those that reach `length`.

    Args:
        rotary_dim: numbers of a head that turn. With 2 no base holds, and all bases found are infinite.
        length: the context wanted.
        resolution: the grid's relative step; None: 1%, or 3% where a context beyond 65,536 makes that slow. What
            holds only between two grid points is not seen.
        beyond: the search ends this many times above the last base that fails.
    """
    resolution = resolution or (0.01 if length <= 65_536 else 0.03)
    if rotary_dim < 4:
        return SmallestBase(math.inf, math.inf, math.inf, resolution)
    exponent = math.ceil(math.log(10) / math.log1p(resolution))
    smallest = always = None
    while True:
        base = (1 + resolution) ** exponent
        if first_failure(rope.base_frequencies(base, rotary_dim), length) is not None:
            always = None
        else:
            smallest, always = smallest or base, always or base
            if base > beyond * always:
                return SmallestBase(smallest, always, base, resolution)
        exponent += 1


def never_turned(frequencies: Tensor, trained: int) -> float:
    """Share of planes that did not complete one turn in `trained` tokens: they meet new angles beyond."""
    return float((frequencies * trained < 2 * math.pi).double().mean())


@dataclass(frozen=True)
class Recommendation:
    """A rule, and why."""

    rule: str
    reason: str


def recommend(parameters: rope.Parameters, *, rotary_dim: int, trained: int) -> Recommendation:
    """The rule for a model's rotary width and trained length, whether or not training follows.

    YaRN came out best of all rules both without training and after it (docs/results/long-context.md).
    """
    source = rope.rope_type(parameters)
    if source in ("yarn", "llama3", "longrope"):
        return Recommendation(source, f"the source already scales by {source}: only it composes exactly")
    if source == "linear":
        return Recommendation("ntk", "on a linearly scaled source a larger base composes exactly")
    turned = 1 - never_turned(rope.base_frequencies(parameters["rope_theta"], rotary_dim), trained)
    return Recommendation(
        "yarn",
        f"no plane should meet an angle it never saw: yarn leaves the fast planes of the {turned:.0%} that "
        f"completed a turn in {trained} tokens and slows the others",
    )
