"""Test whether a difference between two models on the same samples is significant. Paired statistics in float64.

Means of paired differences use Student's t. Ratios of sums (nats per token over documents of different length) use
the studentised bootstrap over documents (Efron & Tibshirani 1993, An Introduction to the Bootstrap, 12.5). Changes
between right and wrong use the score test of Tango (1998, Statistics in Medicine 17, 891), which is McNemar's test
(1947) for the hypothesis of no difference. Several tasks together use Holm's step-down correction (1979). The
distributions are those of scipy, the correction is that of statsmodels.

The p-value and the interval of a difference are one rule: the interval holds the differences that the test does not
reject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError

RESAMPLES = 2000
# Random numbers drawn at once by the bootstrap: bounds memory, does not change the result.
_DRAWN_AT_ONCE = 1 << 22


def require_packages() -> None:
    """Check that the packages of the statistics are installed.

    Raises:
        HeadwiseError: scipy or statsmodels is not installed.
    """
    missing = [name for name in ("scipy", "statsmodels") if find_spec(name) is None]
    if missing:
        raise HeadwiseError(
            f"The statistics of an evaluation need {' and '.join(missing)}, which is not installed.",
            "pip install 'headwise[eval]'",
        )


def _distributions() -> Any:
    """Return scipy.stats, whose import takes a second."""
    from scipy import stats

    return stats


@dataclass(frozen=True)
class Difference:
    """An estimated difference and its sampling error.

    Attributes:
        estimate: child minus parent.
        standard_error: of the estimate; infinite for a single sample.
        samples: number of pairs.
        pivots: errors of resampled estimates in units of their own standard errors, sorted, (resamples,); None: the
            errors follow Student's t with `samples - 1` degrees of freedom.
        bounded: whether each sample is a share of right answers, so that its difference is between -1 and 1.
        flips: samples that only the child and only the parent gets right, where each sample is right or wrong. The
            score test then decides.
    """

    estimate: float
    standard_error: float
    samples: int
    pivots: Tensor | None = None
    bounded: bool = False
    flips: tuple[int, int] | None = None

    def __neg__(self) -> Difference:
        pivots = None if self.pivots is None else -self.pivots.flip(0)
        flips = None if self.flips is None else self.flips[::-1]
        return replace(self, estimate=-self.estimate, pivots=pivots, flips=flips)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Compute the confidence interval of the true difference: what `above` does not reject in both directions.

        Args:
            level: share of repetitions whose interval contains the true difference.

        Returns:
            The lower and the upper bound.
        """
        tail = (1 - level) / 2
        low, high = self._lower_bound(tail), -(-self)._lower_bound(tail)
        return (max(-1.0, low), min(1.0, high)) if self.bounded else (low, high)

    def _lower_bound(self, tail: float) -> float:
        """Return the smallest true difference whose one-sided p-value is not below `tail`."""
        if self.flips is not None:
            return self._lower_score_bound(tail)
        if self.standard_error == 0:
            if self.bounded:
                return (1 + self.estimate) * math.pow(tail, 1 / self.samples) - 1
            return self.estimate if self.estimate == 0 or 0.5**self.samples < tail else -math.inf
        if math.isinf(self.standard_error):
            return -math.inf
        if self.pivots is None:
            return self.estimate - t_quantile(1 - tail, self.samples - 1) * self.standard_error
        rank = math.ceil(tail * (1 + len(self.pivots))) - 1
        return self.estimate - float(self.pivots[-rank]) * self.standard_error if rank else -math.inf

    def _lower_score_bound(self, tail: float) -> float:
        quantile = float(_distributions().norm.isf(tail))
        low, high = -1.0, self.estimate
        for _ in range(60):  # the statistic falls with the difference
            middle = (low + high) / 2
            distance, deviation = self._score(middle)
            low, high = (middle, high) if distance > quantile * deviation else (low, middle)
        return low

    def _score(self, difference: float) -> tuple[float, float]:
        """Return how far the gained minus the lost samples are above their expectation, and their deviation.

        The chance of a loss has its most likely value under the difference. The deviation has the factor of
        Miettinen & Nurminen (1985, Statistics in Medicine 4, 213), which counts at few samples.
        """
        assert self.flips is not None
        (gained, lost), samples = self.flips, self.samples
        b = (2 * samples - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        chance = (math.sqrt(max(0.0, b * b - 8 * samples * c)) - b) / (4 * samples)
        variance = samples * max(0.0, 2 * chance + difference * (1 - difference))
        return (gained - lost - samples * difference) * math.sqrt((samples - 1) / samples), math.sqrt(variance)

    def above(self, threshold: float = 0.0) -> float:
        """Compute the one-sided p-value of a true difference of at most `threshold`.

        Args:
            threshold: the largest true difference of the null hypothesis.
        """
        if self.flips is not None:
            distance, deviation = self._score(threshold)
            if deviation == 0:
                return 0.0 if distance > 0 else 1.0
            return float(_distributions().norm.sf(distance / deviation))
        excess = self.estimate - threshold
        if self.standard_error == 0:
            if excess <= 0:
                return 1.0
            # All pairs differ by the same amount, so only their number is evidence: as in a sign test, or with the
            # most likely distribution between -1 and 1 whose mean is the threshold.
            share = (1 + threshold) / (1 + self.estimate) if self.bounded else 0.5
            return float(max(0.0, share) ** self.samples)
        if self.pivots is None:
            return t_tail(excess / self.standard_error, self.samples - 1)
        num_larger = int((self.pivots >= excess / self.standard_error).sum())
        return (1 + num_larger) / (1 + len(self.pivots))

    def p_value(self) -> float:
        """Compute the two-sided p-value of no difference."""
        return 1.0 if self.estimate == 0 else min(1.0, 2 * min(self.above(), (-self).above()))


def paired_mean(child: Tensor, parent: Tensor) -> Difference:
    """Estimate the difference of two means over the same samples.

    Args:
        child: figure of each sample, (samples,).
        parent: figure of each sample, (samples,), in the same order.

    Returns:
        The difference, whose errors follow Student's t.
    """
    differences = child.double() - parent.double()
    samples = len(differences)
    error = float(differences.std()) / math.sqrt(samples) if samples > 1 else math.inf
    return Difference(float(differences.mean()), error, samples)


def paired_ratio(
    child: Tensor, parent: Tensor, weights: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Estimate the difference of two ratios sum(x) / sum(weights) over the same documents, such as nats per token.

    Args:
        child: sum of each document, (documents,).
        parent: sum of each document, (documents,), in the same order.
        weights: number of summed items (tokens, words), (documents,); positive.
        resamples: number of bootstrap resamples.
        seed: random seed of the bootstrap.

    Returns:
        The difference, whose errors follow the bootstrap distribution.
    """
    differences, weights = child.double() - parent.double(), weights.double()
    documents = len(differences)
    estimate = float(differences.sum() / weights.sum())
    residuals = differences - estimate * weights
    if documents < 2:
        return Difference(estimate, math.inf, documents, torch.zeros(1, dtype=torch.float64))
    scale = math.sqrt(documents / (documents - 1))
    error = scale * float(residuals.square().sum().sqrt() / weights.sum())
    # With equal differences the residuals are rounding errors, and ratios of rounding errors are noise.
    if error <= 1e-12 * float(differences.abs().sum() / weights.sum()):
        return Difference(estimate, 0.0, documents)
    columns = torch.stack([residuals, weights, residuals**2, residuals * weights, weights**2], 1)
    generator = torch.Generator().manual_seed(seed)
    pivots = []
    for part in torch.zeros(resamples).split(max(1, _DRAWN_AT_ONCE // documents)):
        drawn = torch.randint(documents, (len(part), documents), generator=generator)
        total, size, square, cross, size_square = (column[drawn].sum(1) for column in columns.T)
        errors = total / size
        spread = (square - 2 * errors * cross + errors**2 * size_square).clamp_min(0).sqrt() * scale / size
        pivots.append(torch.where(spread > 0, errors / spread, 0.0))
    return Difference(estimate, error, documents, torch.cat(pivots).sort().values)


def paired_answers(child: Tensor, parent: Tensor) -> Difference:
    """Estimate the difference of two shares of right answers to the same, independent questions.

    Args:
        child: 0 or 1 for each question, (samples,).
        parent: 0 or 1 for each question, (samples,), in the same order.

    Returns:
        The difference, tested by the score test.
    """
    return replace(paired_mean(child, parent), bounded=True, flips=count_flips(child, parent))


def count_flips(child: Tensor, parent: Tensor) -> tuple[int, int]:
    """Count the samples that only one of two models gets right.

    Args:
        child: 0 or 1 for each sample, (samples,).
        parent: 0 or 1 for each sample, (samples,), in the same order.

    Returns:
        Gained (only the child is right) and lost (only the parent is right).
    """
    child, parent = child > 0.5, parent > 0.5
    return int((child & ~parent).sum()), int((parent & ~child).sum())


def smallest_significant(damage: Difference, level: float) -> float | None:
    """Compute the smallest estimated damage that these samples would show as significant.

    Of right-or-wrong answers, the number that only the child gets right stays as it is.

    Args:
        damage: the damage with its sampling error; a larger estimate is worse.
        level: two-sided p-value below which a difference is significant.

    Returns:
        The damage in the unit of `damage`; None where no damage would be significant.
    """
    if damage.flips is None:
        smallest = damage.estimate - damage.interval(1 - level)[0]
        return smallest if math.isfinite(smallest) else None
    gained, samples = damage.flips[1], damage.samples
    for lost in range(gained + 1, samples - gained + 1):
        share = (lost - gained) / samples
        if replace(damage, estimate=share, flips=(lost, gained)).p_value() < level:
            return share
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down procedure (1979).

    Args:
        p_values: one p-value for each hypothesis.

    Returns:
        Corrected p-values in the same order. If those below alpha are rejected, the probability that a true
        hypothesis is among them is at most alpha.
    """
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def t_tail(t: float, degrees: int) -> float:
    """Compute P(T > t) for Student's t.

    Args:
        t: the quantile.
        degrees: degrees of freedom; below 1 the result is 0.5.
    """
    return float(_distributions().t.sf(t, degrees)) if degrees >= 1 else 0.5


def t_quantile(probability: float, degrees: int) -> float:
    """Compute the t with P(T <= t) = probability for Student's t.

    Args:
        probability: between 0 and 1.
        degrees: degrees of freedom, at least 1.
    """
    return float(_distributions().t.ppf(probability, degrees))
