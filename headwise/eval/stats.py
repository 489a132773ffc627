"""PURE: is a difference between two models on the same samples real? Paired statistics, in float64.

A mean of paired differences is judged by Student's t, a ratio of sums (nats per token over documents of unlike
length) by the studentised bootstrap over documents (Efron & Tibshirani 1993, An Introduction to the Bootstrap,
12.5), flips between right and wrong by the exact form of McNemar's test, and several tasks together by Holm's
step-down procedure (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RESAMPLES = 2000
# Numbers drawn at once while resampling: bounds memory, not the result.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Difference:
    """An estimated difference and how far off it may be.

    Attributes:
        estimate: child minus parent.
        standard_error: of the estimate; infinite for a single sample.
        samples: pairs behind it.
        pivots: errors of resampled estimates in units of their own standard errors, sorted; None: the errors follow
            Student's t with `samples - 1` degrees of freedom.
        binary: whether each sample is right or wrong, so that equal pairs leave room for others not yet seen.
    """

    estimate: float
    standard_error: float
    samples: int
    pivots: Tensor | None = None
    binary: bool = False

    def __neg__(self) -> Difference:
        pivots = None if self.pivots is None else -self.pivots.flip(0)
        return replace(self, estimate=-self.estimate, pivots=pivots)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bounds that hold the true difference in `level` of all repetitions."""
        if self.standard_error == 0:
            # The largest share of flips that is likely to show none (Clopper & Pearson 1934), either way.
            unseen = 1 - (1 - level) ** (1 / self.samples) if self.binary else 0.0
            return self.estimate - unseen, self.estimate + unseen
        if math.isinf(self.standard_error):
            return -math.inf, math.inf
        tail = (1 - level) / 2
        if self.pivots is None:
            low = high = t_quantile(1 - tail, self.samples - 1)
        else:
            low, high = (float(self.pivots.quantile(at)) for at in (1 - tail, tail))
            high = -high
        return self.estimate - low * self.standard_error, self.estimate + high * self.standard_error

    def above(self, threshold: float = 0.0) -> float:
        """One-sided p-value: how likely an estimate this large is if the true difference is `threshold` or less."""
        excess = self.estimate - threshold
        if self.standard_error == 0:
            # All pairs differ by the same: what is left of the evidence is their number, as in a sign test.
            return 0.5**self.samples if excess > 0 else 1.0
        if self.pivots is None:
            return t_tail(excess / self.standard_error, self.samples - 1)
        larger = int((self.pivots >= excess / self.standard_error).sum())
        return (1 + larger) / (1 + len(self.pivots))

    def p_value(self) -> float:
        """Two-sided p-value of no difference."""
        return 1.0 if self.estimate == 0 else min(1.0, 2 * min(self.above(), (-self).above()))


def paired_mean(child: Tensor, parent: Tensor) -> Difference:
    """Difference of two means over the same samples.

    Args:
        child, parent: one figure for each sample, (samples,), in the same order.
    """
    differences = child.double() - parent.double()
    count = len(differences)
    error = float(differences.std()) / math.sqrt(count) if count > 1 else math.inf
    return Difference(float(differences.mean()), error, count)


def paired_ratio(
    child: Tensor, parent: Tensor, weights: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Difference of two ratios sum(x) / sum(weights) over the same documents, such as nats per token.

    Args:
        child, parent: one sum for each document, (documents,).
        weights: what it was summed over (tokens, words), (documents,); positive.
        resamples: of the bootstrap.
        seed: of the resampling.
    """
    differences, weights = child.double() - parent.double(), weights.double()
    count = len(differences)
    estimate = float(differences.sum() / weights.sum())
    residuals = differences - estimate * weights
    if count < 2:
        return Difference(estimate, math.inf, count, torch.zeros(1, dtype=torch.float64))
    scale = math.sqrt(count / (count - 1))
    error = scale * float(residuals.square().sum().sqrt() / weights.sum())
    # Equal differences leave rounding alone in the residuals, whose ratio to itself would be noise.
    if error <= 1e-12 * float(differences.abs().sum() / weights.sum()):
        return Difference(estimate, 0.0, count)
    columns = torch.stack([residuals, weights, residuals**2, residuals * weights, weights**2], 1)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in torch.zeros(resamples).split(max(1, _AT_ONCE // count)):
        drawn = torch.randint(count, (len(part), count), generator=generator)
        total, size, square, cross, size_square = (column[drawn].sum(1) for column in columns.T)
        off = total / size
        spread = (square - 2 * off * cross + off**2 * size_square).clamp_min(0).sqrt() * scale / size
        found.append(torch.where(spread > 0, off / spread, 0.0))
    return Difference(estimate, error, count, torch.cat(found).sort().values)


def flips(child: Tensor, parent: Tensor) -> tuple[int, int]:
    """Samples that only the child gets right (gained) and that only the parent does (lost)."""
    child, parent = child > 0.5, parent > 0.5
    return int((child & ~parent).sum()), int((parent & ~child).sum())


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's test in its exact, binomial form: flips fall either way with probability 1/2.

    Twice the smaller tail, at most 1 (McNemar 1947; without the normal approximation).
    """
    total, least = gained + lost, min(gained, lost)
    ways = term = 1
    for k in range(least):
        term = term * (total - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / 2**total)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the given order: reject those below alpha, and the chance that any
    true hypothesis is among them is at most alpha."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def t_tail(t: float, dof: int) -> float:
    """P(T > t) for Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4. Its absolute error is rounding, about 1e-15.
    """
    if dof < 1:
        return 0.5
    angle = math.atan2(abs(t), math.sqrt(dof))
    odd = dof % 2
    k = torch.arange(1, max(1, dof // 2), dtype=torch.float64)
    terms = (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * math.cos(angle) ** 2
    series = 1 + float(terms.cumprod(0).sum()) if dof > 1 else 0.0
    inside = math.sin(angle) * series
    if odd:
        inside = 2 / math.pi * (angle + math.cos(angle) * inside)
    return (1 - math.copysign(inside, t)) / 2


def t_quantile(probability: float, dof: int) -> float:
    """The t with P(T <= t) = probability, by bisection."""
    if probability < 0.5:
        return -t_quantile(1 - probability, dof)
    low, high = 0.0, 1.0
    while t_tail(high, dof) > 1 - probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, dof) > 1 - probability else (low, middle)
    return (low + high) / 2
