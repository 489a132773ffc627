"""Test whether a difference between two models on the same samples is significant. Paired statistics in float64.

Means of paired differences use Student's t. Ratios of sums (nats per token over documents of different length) use
the studentised bootstrap over documents (Efron & Tibshirani 1993, An Introduction to the Bootstrap, 12.5). Changes
between right and wrong use the exact McNemar test (1947), and several tasks together Holm's step-down correction
(1979). The distributions are those of scipy, the correction is that of statsmodels.
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
        binary: whether each sample is right or wrong. Equal pairs then still allow a difference on other samples.
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
        """Compute the confidence interval of the true difference.

        Args:
            level: share of repetitions whose interval contains the true difference.

        Returns:
            The lower and the upper bound.
        """
        if self.standard_error == 0:
            # Upper bound of Clopper & Pearson (1934) on the share of changed samples when none was observed.
            unobserved = float(_distributions().beta.ppf(level, 1, self.samples)) if self.binary else 0.0
            return self.estimate - unobserved, self.estimate + unobserved
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
        """Compute the one-sided p-value of a true difference of at most `threshold`.

        Args:
            threshold: the largest true difference of the null hypothesis.
        """
        excess = self.estimate - threshold
        if self.standard_error == 0:
            # All pairs differ by the same amount, so only their number is evidence, as in a sign test.
            return 0.5**self.samples if excess > 0 else 1.0
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


def mcnemar(gained: int, lost: int) -> float:
    """Compute the two-sided p-value of the exact McNemar test (1947).

    Args:
        gained: samples that only the child gets right.
        lost: samples that only the parent gets right.

    Returns:
        The p-value of equal chances of both changes.
    """
    if gained == lost:
        return 1.0
    return float(_distributions().binomtest(gained, gained + lost).pvalue)


def smallest_significant(damage: Difference, level: float, gained: int | None = None) -> float | None:
    """Compute the smallest estimated damage that these samples would show as significant.

    Args:
        damage: the damage with its sampling error; a larger estimate is worse.
        level: two-sided p-value below which a difference is significant.
        gained: questions that only the child gets right, where the exact McNemar test decides. None: the interval
            of `damage` decides.

    Returns:
        The damage in the unit of `damage`; None where no damage would be significant.
    """
    if gained is None:
        smallest = damage.estimate - damage.interval(1 - level)[0]
        return smallest if math.isfinite(smallest) else None
    for lost in range(gained + 1, damage.samples - gained + 1):
        if mcnemar(gained, lost) < level:
            return (lost - gained) / damage.samples
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
