"""Comparisons of child and parent by pairs, groups of tasks, and gates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.eval.compare import (
    compare_perplexity,
    compare_tasks,
    correct,
    cut_for_one,
    damage_gates,
    name_unfit_task,
    name_unfit_text,
    same_questions,
)
from headwise.eval.tasks.answers import AnswerCounts
from headwise.eval.tasks.samples import TaskResults
from tests.eval.lm_eval_files import ACC, write_results


def test_pairs_and_gates(tmp_path: Path) -> None:
    right = [1.0] * 80 + [0.0] * 20
    worse = [1.0] * 55 + [0.0] * 45
    child = write_results(tmp_path / "child", {"a": {"acc": worse}, "b": {"acc": right}})
    parent = write_results(tmp_path / "parent", {"a": {"acc": right}, "b": {"acc": right}})
    compared = correct(compare_tasks(child, parent))
    first, second = (one.comparison for one in compared)
    assert first.paired and first.paired.difference == -0.25 and first.damage == 0.25
    assert (first.paired.gained, first.paired.lost, first.paired.test) == (0, 25, "score")
    statistic = 25**2 / 25 * 99 / 100  # McNemar's, with the factor for few samples
    assert first.paired.p_holm == pytest.approx(2 * math.erfc(math.sqrt(statistic / 2)))
    assert first.paired.low < first.paired.difference < first.paired.high < 0
    assert second.paired and second.paired.p_holm == 1 and second.damage == 0
    assert [gate.passed for gate in damage_gates(compared, 0.1)] == [False, True]
    assert [gate.passed for gate in damage_gates(compared, 0.2)] == [True, True]  # lost more, but not significantly


def test_perplexity_is_compared_by_its_logarithm() -> None:
    generator = torch.Generator().manual_seed(0)
    parent = 100 + 20 * torch.rand(30, generator=generator)
    compared = compare_perplexity("heldout", parent * 1.02, parent, torch.full((30,), 50))
    one = compared.comparison
    assert one.parent and one.parent.value == pytest.approx(math.exp(float(parent.mean()) / 50), rel=1e-5)
    assert one.paired and one.paired.difference == pytest.approx(
        math.log(one.child.value / one.parent.value), rel=1e-5
    )
    assert one.damage == pytest.approx(one.child.value / one.parent.value - 1, rel=1e-5)
    assert compared.exceeds(0.01) < 0.05 < compared.exceeds(0.06)


def test_targets_of_different_lengths_weigh_by_their_tokens() -> None:
    tokens = torch.tensor([2, 30, 5, 11])
    nats = torch.tensor([9.0, 31.0, 4.0, 25.0])
    one = compare_perplexity("targets", nats + tokens, nats, tokens).comparison
    assert one.parent and one.parent.value == pytest.approx(math.exp(69 / 48))
    assert one.paired and one.paired.difference == pytest.approx(1.0)
    rest = nats.double() - 69 / 48 * tokens
    assert one.parent.standard_error == pytest.approx(one.parent.value * float(rest.std()) / 12 / 2)


def test_every_metric_of_a_task_is_tested(tmp_path: Path) -> None:
    """A perplexity collapses while the accuracy of ten questions shows nothing."""
    acc = [1.0, 0.0] * 5
    nats = [-4.0 - 0.1 * i for i in range(10)]
    collapsed = [each - 5.0 - 0.05 * i for i, each in enumerate(nats)]
    child = write_results(tmp_path / "child", {"a": {"acc": acc[::-1], "perplexity": collapsed}})
    parent = write_results(tmp_path / "parent", {"a": {"acc": acc, "perplexity": nats}})
    headline, other = (gated.comparison for gated in correct(compare_tasks(child, parent)))
    assert headline.metric == "acc" and not headline.is_significant
    assert other.is_perplexity and other.is_significant and other.damage and other.damage > 100
    assert headline.detectable is None  # 5 gained, 5 lost: no more than 5 more can be lost
    assert other.detectable and 0 < other.detectable < other.damage


def test_a_question_cut_for_one_model_is_left_out(tmp_path: Path) -> None:
    right, worse = [1.0] * 8, [0.0] * 3 + [1.0] * 5
    samples = {"a": {"acc": worse}, "b": {"acc": right}}, {"a": {"acc": right}, "b": {"acc": right}}
    group = {"groups": {"g": {"acc,none": 13 / 16}}, "group_subtasks": {"g": ["a", "b"]}}
    child = write_results(tmp_path / "child", samples[0], **group)
    parent = write_results(tmp_path / "parent", samples[1])

    def cut(results: TaskResults, *numbers: int) -> TaskResults:
        keys = tuple(f"a{number}p" for number in numbers)
        return replace(results, answers={"a": AnswerCounts(8, keys, 0)})

    both = compare_tasks(cut(child, 0, 1), cut(parent, 0, 1))
    assert [c.comparison.samples for c in both] == [16, 8, 8]
    assert [c.comparison.num_fewshot for c in both] == [None, None, 5]
    whole, a, b = (c.comparison for c in compare_tasks(cut(child, 0, 1, 7), cut(parent, 7)))
    assert (whole.samples, a.samples, b.samples) == (14, 6, 8)
    assert a.paired and (a.child.value, a.paired.lost) == (5 / 6, 1) and whole.child.value == 13 / 14
    assert cut_for_one(cut(child, 0, 7), cut(parent, 7)) == {"a": {"a0p"}}
    none = compare_tasks(cut(child, *range(8)), cut(parent))
    assert [c.comparison.paired is None for c in none] == [False, True, False]


def test_questions_on_one_passage_are_resampled_together(tmp_path: Path) -> None:
    """Ten passages of eight questions: the child loses whole passages, so 80 answers are ten observations."""
    passages = [f"passage {i // 8}" for i in range(80)]
    worse = [0.0 if i < 24 else 1.0 for i in range(80)]
    results = []
    for name, values in (("child", worse), ("parent", [1.0] * 80)):
        docs = [{"doc": {"passage": passage}} for passage in passages]
        results.append(write_results(tmp_path / name, {"a": {"acc": values}}, docs=docs))
    (gated,) = correct(compare_tasks(*results))
    paired = gated.comparison.paired
    assert gated.comparison.clusters == 10 and gated.comparison.samples == 80
    assert paired and (paired.test, paired.gained, paired.lost) == ("t", 0, 24)
    # Three of ten passages lost: the standard error of ten observations, and no certainty.
    assert paired.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9)) and 0.05 < paired.p_value < 0.2


def test_a_text_on_which_the_parent_fails_is_unfit(tmp_path: Path) -> None:
    nats = torch.full((4,), math.log(598) * 50)
    gated = compare_perplexity("heldout", nats, nats, torch.full((4,), 50))
    assert "598" in (name_unfit_text(gated, 49_152).comparison.unfit or "")
    assert name_unfit_text(gated, 10**6).comparison.unfit is None
    assert name_unfit_text(gated, None).comparison.unfit is None
    guesses = write_results(tmp_path / "a", {"a": {"acc": [1.0, 0.0, 0.0, 0.0] * 10}})
    (guess,) = compare_tasks(guesses, guesses)
    assert "guess has 25%" in (name_unfit_task(guess, [{"resps": [0] * 4}] * 40).comparison.unfit or "")
    assert name_unfit_task(guess, [{"resps": [0] * 20}] * 40).comparison.unfit is None
    assert name_unfit_task(guess, [{"resps": [0]}] * 40).comparison.unfit is None  # one answer, no choices


def test_a_group_has_the_headline_figure_of_its_tasks(tmp_path: Path) -> None:
    tasks = {"a": {"acc": ACC}, "b": {"acc": [1.0, 0.0]}}
    more = {"group_subtasks": {"all": ["some", "b"], "some": ["a"]}, "groups": {"all": {"acc,none": 5 / 8}}}
    child = write_results(tmp_path / "child", tasks, **more)
    comparisons = [one.comparison for one in compare_tasks(child, child)]
    assert [(one.task, one.headline, one.group) for one in comparisons] == [
        ("all", True, None), ("a", False, "all"), ("b", False, "all"),
    ]  # fmt: skip
    assert comparisons[0].samples == 8 and comparisons[0].child.value == 5 / 8
    # lm-eval weights the group in another way, so its tasks have the headline figures.
    other = write_results(tmp_path / "other", tasks, **more | {"groups": {"all": {"acc,none": 7 / 12}}})
    assert [one.comparison.headline for one in compare_tasks(other, other)] == [True, True]


def test_other_questions_are_refused(tmp_path: Path) -> None:
    one = write_results(tmp_path / "one", {"a": {"acc": ACC}})
    other = write_results(tmp_path / "other", {"a": {"acc": ACC[:-1]}})
    assert same_questions(one, one) and not same_questions(one, other)
    with pytest.raises(HeadwiseError, match="different questions"):
        compare_tasks(one, other)
