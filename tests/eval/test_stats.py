"""Paired statistics, against printed tables, closed forms and error rates in simulations."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.eval import stats
from headwise.eval.stats import (
    Difference,
    count_flips,
    holm,
    paired_answers,
    paired_mean,
    paired_ratio,
    require_packages,
    smallest_significant,
    t_quantile,
    t_tail,
)


@pytest.mark.parametrize(
    ("dof", "probability", "t"),  # Student's t, from printed tables
    [(1, 0.975, 12.7062), (2, 0.95, 2.9200), (5, 0.975, 2.5706), (10, 0.95, 1.8125), (30, 0.975, 2.0423),
     (120, 0.975, 1.9799), (100_000, 0.975, 1.9600)],
)  # fmt: skip
def test_student_t(dof: int, probability: float, t: float) -> None:
    assert t_quantile(probability, dof) == pytest.approx(t, abs=6e-5)
    assert t_quantile(1 - probability, dof) == pytest.approx(-t, abs=6e-5)
    assert t_tail(t, dof) == pytest.approx(1 - probability, abs=2e-5)
    assert t_tail(-t, dof) == pytest.approx(probability, abs=2e-5)


def closed_form_tail(t: float, degrees: int) -> float:
    """P(T > t) by the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(abs(t), math.sqrt(degrees))
    odd = degrees % 2
    k = torch.arange(1, max(1, degrees // 2), dtype=torch.float64)
    terms = (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * math.cos(angle) ** 2
    inside = math.sin(angle) * (1 + float(terms.cumprod(0).sum()) if degrees > 1 else 0.0)
    if odd:
        inside = 2 / math.pi * (angle + math.cos(angle) * inside)
    return (1 - math.copysign(inside, t)) / 2


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 10, 30, 99, 120, 1000, 5000])
def test_student_t_equals_the_closed_form(degrees: int) -> None:
    for t in (-40, -5, -1.96, -0.3, 0, 1e-3, 0.5, 1, 2, 3.3, 8, 30):
        assert t_tail(t, degrees) == pytest.approx(closed_form_tail(t, degrees), abs=1e-12)
    for probability in (0.025, 0.05, 0.4, 0.6, 0.95, 0.975):
        quantile = t_quantile(probability, degrees)
        assert closed_form_tail(quantile, degrees) == pytest.approx(1 - probability, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_holm_equals_the_definition(count: int) -> None:
    p_values = (
        torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64) ** 4
    ).tolist()
    adjusted, largest = [0.0] * count, 0.0
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    assert holm(p_values) == pytest.approx(adjusted, rel=1e-12)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages()
    monkeypatch.setattr(stats, "find_spec", lambda name: None if name == "statsmodels" else True)
    with pytest.raises(HeadwiseError, match="need statsmodels, which is not installed") as caught:
        require_packages()
    assert "headwise[eval]" in str(caught.value)


def test_cauchy_is_t_with_one_degree() -> None:
    assert t_tail(1.0, 1) == pytest.approx(0.25)
    assert t_tail(0.0, 7) == 0.5


def answers(gained: int, lost: int, samples: int) -> Difference:
    child = torch.zeros(samples)
    parent = torch.zeros(samples)
    child[:gained] = 1
    parent[gained : gained + lost] = 1
    return paired_answers(child, parent)


@pytest.mark.parametrize(("gained", "lost", "samples"), [(0, 4, 10), (3, 1, 4), (12, 30, 100), (0, 900, 1000)])
def test_without_a_difference_the_score_test_is_mcnemars(gained: int, lost: int, samples: int) -> None:
    statistic = (samples - 1) / samples * (gained - lost) ** 2 / (gained + lost)
    expected = math.erfc(math.sqrt(statistic / 2))  # chi-square with one degree of freedom
    assert answers(gained, lost, samples).p_value() == pytest.approx(expected, rel=1e-9)


def test_the_score_bound_of_equal_answers_equals_the_closed_form() -> None:
    low, high = answers(0, 0, 50).interval()
    z2 = 1.959964**2
    assert high == -low == pytest.approx(z2 / (49 + z2), rel=1e-6)


@pytest.mark.parametrize(("gained", "lost", "samples"), [(1, 3, 44), (0, 4, 10), (25, 12, 100)])
def test_the_score_takes_the_most_likely_chance_of_a_loss(gained: int, lost: int, samples: int) -> None:
    """At the ends of the interval, with the likelihood maximised on a grid."""
    for end, z in zip(answers(gained, lost, samples).interval(), (1.959964, -1.959964), strict=True):
        chances = torch.linspace(max(0.0, -end), (1 - end) / 2, 200_001, dtype=torch.float64)[1:-1]
        likelihood = gained * (chances + end).log() + lost * chances.log()
        likelihood += (samples - gained - lost) * (1 - 2 * chances - end).log()
        chance = float(chances[likelihood.argmax()])
        deviation = math.sqrt(samples * (2 * chance + end - end**2) * samples / (samples - 1))
        assert (gained - lost - samples * end) / deviation == pytest.approx(z, abs=2e-3)


@pytest.mark.parametrize("samples", [1, 2, 3, 6, 10, 33])
def test_an_interval_excludes_zero_exactly_where_its_p_value_is_significant(samples: int) -> None:
    counts = range(0, samples + 1, 1 + samples // 7)
    differences = [answers(one, other, samples) for one in counts for other in counts if one + other <= samples]
    generator = torch.Generator().manual_seed(samples)
    for shift in (0.0, 0.3, 0.6, 1.0):
        values = torch.rand((2, samples), generator=generator) + torch.tensor([[shift], [0.0]])
        weights = torch.randint(1, 9, (samples,), generator=generator).double()
        differences += [paired_mean(*values), paired_ratio(*values * weights, weights, resamples=200)]
        equal = torch.full((samples,), shift)
        differences += [paired_mean(equal, equal - equal), replace(paired_mean(equal, equal * 0), bounded=True)]
    for difference in differences + [-each for each in differences]:
        for level in (0.9, 0.95, 0.999):
            low, high = difference.interval(level)
            assert low <= difference.estimate <= high
            assert (low > 0 or high < 0) == (difference.p_value() < 1 - level), difference
            assert (low > 0.05) == (difference.above(0.05) < (1 - level) / 2), difference


@pytest.mark.parametrize(("samples", "flip"), [(10, 0.3), (50, 0.1)])
def test_the_score_test_rejects_at_most_five_percent_without_a_difference(samples: int, flip: float) -> None:
    def chance(count: int, total: int, share: float) -> float:
        return math.comb(total, count) * share**count * (1 - share) ** (total - count)

    rejected = sum(
        chance(flips, samples, flip) * chance(gained, flips, 0.5)
        for flips in range(min(samples, 20) + 1)
        for gained in range(flips + 1)
        if answers(gained, flips - gained, samples).p_value() < 0.05
    )
    assert 0 < rejected < 0.05


def test_flips_count_both_ways() -> None:
    child, parent = torch.tensor([1.0, 0, 1, 0, 1]), torch.tensor([1.0, 1, 0, 0, 0])
    assert count_flips(child, parent) == (2, 1)


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.8]) == [1.0, 1.0]


def test_paired_mean_is_the_one_sample_t_test_on_differences() -> None:
    difference = paired_mean(torch.tensor([1.0, 0, 0, 1, 0, 0]), torch.tensor([1.0, 1, 1, 1, 0, 1]))
    assert difference.estimate == -0.5
    assert difference.standard_error == pytest.approx(math.sqrt(0.3 / 6))
    low, high = difference.interval()
    assert (low, high) == pytest.approx((-0.5 - 2.5706 * 0.2236, -0.5 + 2.5706 * 0.2236), abs=1e-4)
    assert difference.p_value() == pytest.approx(2 * t_tail(0.5 / math.sqrt(0.05), 5))
    assert (-difference).above(0.2) == pytest.approx(t_tail(0.3 / math.sqrt(0.05), 5))


def test_equal_samples_have_a_difference_of_exactly_0() -> None:
    nats, words = torch.rand(50, generator=torch.Generator().manual_seed(0)), torch.arange(1, 51)
    for difference in (paired_mean(nats, nats), paired_ratio(nats, nats, words)):
        assert (difference.estimate, difference.standard_error, difference.interval()) == (0, 0, (0, 0))
        assert difference.p_value() == 1 and difference.above() == 1 and difference.above(0.01) == 1


def test_one_sample_is_no_evidence() -> None:
    for difference in (
        paired_mean(torch.ones(1), torch.zeros(1)),
        paired_ratio(torch.ones(1), torch.zeros(1), torch.ones(1)),
    ):
        assert (
            difference.estimate == 1
            and difference.interval() == (-math.inf, math.inf)
            and difference.above() > 0.05
        )


def test_equal_differences_are_judged_by_their_number() -> None:
    assert (paired_mean(torch.ones(4), torch.zeros(4))).above() == 1 / 16
    weights = torch.tensor([3.0, 5, 7])
    assert paired_ratio(3 * weights, 2 * weights, weights).above() == 1 / 8


def test_ratio_weighs_documents_by_their_length() -> None:
    child, parent, words = torch.tensor([10.0, 40]), torch.tensor([8.0, 20]), torch.tensor([10, 10])
    assert paired_ratio(child, parent, words).estimate == pytest.approx(22 / 20)


def test_bootstrap_agrees_with_t_where_both_hold() -> None:
    generator = torch.Generator().manual_seed(2)
    child = torch.randn(200, generator=generator, dtype=torch.float64) + 0.1
    parent = torch.zeros(200)
    by_t = paired_mean(child, parent)
    by_bootstrap = paired_ratio(child, parent, torch.ones(200))
    assert by_bootstrap.estimate == pytest.approx(by_t.estimate)
    assert by_bootstrap.standard_error == pytest.approx(by_t.standard_error)
    assert by_bootstrap.interval() == pytest.approx(by_t.interval(), abs=0.15 * by_t.standard_error)
    assert by_bootstrap.p_value() == pytest.approx(by_t.p_value(), abs=0.03)
    assert (-by_bootstrap).interval() == pytest.approx(tuple(-x for x in reversed(by_bootstrap.interval())))


def false_alarms(tasks: int, flip: float, samples: int, repetitions: int) -> float:
    """Return the share of repetitions in which a gate at 0% over `tasks` accuracies and a perplexity fires.

    Each repetition draws samples from a pool of paired outcomes and assigns every pair to parent and child at
    random, so the true difference is 0.
    """
    generator = torch.Generator().manual_seed(1)

    def coin(shape: tuple[int, ...], chance: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < chance

    right = coin((2000,), 0.6)
    pool = torch.stack([right, right ^ coin((2000,), flip)]).double()
    words = torch.randint(20, 300, (2000,), generator=generator)
    nats = torch.stack([2.0 * words, 2.0 * words + torch.randn(2000, generator=generator) * words.sqrt()])
    num_fired = 0
    for _ in range(repetitions):
        damages = []
        for task in range(tasks + 1):
            drawn = torch.randint(2000, (samples,), generator=generator)
            swap = coin((samples,), 0.5)
            one, other = (nats if task == tasks else pool)[:, drawn]
            child, parent = torch.where(swap, one, other), torch.where(swap, other, one)
            if task == tasks:
                damages.append(paired_ratio(child, parent, words[drawn], resamples=500, seed=task))
            else:
                damages.append(-paired_answers(child, parent))
        with mock.patch("gc.collect"):  # statsmodels calls it at every correction, for most of the time
            num_fired += min(holm([damage.above(0.0) for damage in damages])) < 0.05
    return num_fired / repetitions


NO_DIFFERENCE = pytest.mark.parametrize(
    ("tasks", "flip", "samples"), [(1, 0.1, 300), (3, 0.2, 200), (5, 0.05, 500)]
)


@NO_DIFFERENCE
def test_a_gate_at_five_percent_fires_in_five_percent_without_a_difference(
    tasks: int, flip: float, samples: int
) -> None:
    assert 0.02 <= false_alarms(tasks, flip, samples, repetitions=200) <= 0.08


@pytest.mark.full
@NO_DIFFERENCE
def test_the_same_over_many_repetitions(tasks: int, flip: float, samples: int) -> None:
    assert 0.04 <= false_alarms(tasks, flip, samples, repetitions=3000) <= 0.06


def test_the_gate_finds_a_real_damage() -> None:
    generator = torch.Generator().manual_seed(3)
    parent = torch.rand(1000, generator=generator) < 0.7
    child = parent & (torch.rand(1000, generator=generator) < 0.93)  # loses about 5 points
    damage = -paired_answers(child, parent)
    assert damage.above(0.01) < 0.001 and damage.above(0.02) < 0.01
    assert damage.above(0.08) > 0.5  # more than the child lost


def test_resampling_needs_little_memory_and_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(300, generator=torch.Generator().manual_seed(1))
    once = paired_ratio(values, values.flip(0), torch.ones(300), resamples=100)
    monkeypatch.setattr(stats, "_DRAWN_AT_ONCE", 1000)
    in_parts = paired_ratio(values, values.flip(0), torch.ones(300), resamples=100)
    assert once.interval() == in_parts.interval()


def test_equal_answers_of_a_few_passages_allow_a_difference_on_others() -> None:
    shares = torch.tensor([0.5, 1.0] * 10)
    difference = replace(paired_mean(shares, shares), bounded=True)
    low, high = difference.interval()
    # With that share of changed passages, twenty passages show none with a probability of 2.5% on each side.
    assert high == -low and (1 - high) ** 20 == pytest.approx(0.025)
    assert (-difference).interval() == (low, high) and difference.above(0.01) == 1


def test_the_smallest_significant_loss_is_significant_and_one_answer_less_is_not() -> None:
    damage = -answers(2, 3, 40)
    smallest = smallest_significant(damage, 0.01)
    assert smallest is not None
    lost = round(40 * smallest) + 2
    assert answers(2, lost, 40).p_value() < 0.01 <= answers(2, lost - 1, 40).p_value()
    assert smallest_significant(-answers(5, 5, 10), 0.05) is None
