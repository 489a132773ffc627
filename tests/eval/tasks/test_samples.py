"""Figures from lm-eval's files: told apart by how their samples add up; groups; comparisons made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.eval.compare import compare_perplexity, compare_tasks, correct, damage_gates, same_questions
from headwise.eval.tasks.samples import Results, read


def written(folder: Path, tasks: dict[str, dict[str, list[Any]]], **more: Any) -> Results:
    """A folder as lm-eval leaves it, for samples of metrics; then what is read from it."""
    folder.mkdir(parents=True)
    results: dict[str, dict[str, Any]] = {}
    for task, metrics in tasks.items():
        results[task] = {"alias": task, "sample_len": 1}
        count = len(next(iter(metrics.values())))
        rows = [
            {"doc_id": i, "filter": "none", "doc_hash": f"{task}{i}", "prompt_hash": "p", "target_hash": "t"}
            | {metric: values[i] for metric, values in metrics.items()}
            for i in range(count)
        ]
        for metric, values in metrics.items():
            results[task] |= {f"{metric},none": figure(metric, values), f"{metric}_stderr,none": "N/A"}
        lines = "\n".join(json.dumps(row) for row in reversed(rows))  # several processes log in any order
        (folder / f"samples_{task}_2026-01-01T00-00-00.jsonl").write_text(lines)
    direction = {
        "acc": True,
        "acc_norm": True,
        "word_perplexity": False,
        "perplexity": False,
        "f1": True,
        "4096": True,
    }
    found = {
        "results": results,
        "higher_is_better": {task: {m: direction[m] for m in metrics} for task, metrics in tasks.items()},
        "versions": {task: 1.0 for task in tasks},
        "n-shot": {task: 5 for task in tasks},
        **more,
    }
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps(found))
    return read(folder)


def figure(metric: str, values: list[Any]) -> float:
    if metric == "word_perplexity":
        return math.exp(-sum(a for a, _ in values) / sum(b for _, b in values))
    if metric == "perplexity":
        return math.exp(-sum(values) / len(values))
    if metric == "f1":
        return 0.123
    counted = [value for value in values if value != -1]
    return sum(counted) / len(counted)


ACC = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_each_kind_of_figure_is_known_by_its_samples(tmp_path: Path) -> None:
    found = written(
        tmp_path / "one",
        {
            "a": {"acc": ACC, "acc_norm": ACC[::-1]},
            "b": {"word_perplexity": [[-10.0, 4], [-30.0, 6]]},
            "c": {"perplexity": [-1.5, -2.5], "acc": [0.0, 1.0]},
            "d": {"f1": [[1, 0], [1, 1]]},
            "e": {"4096": [1.0, -1, 0.5, -1]},
        },
    )
    assert found.headline("a").metric == "acc_norm" and found.headline("c").metric == "acc"  # type: ignore[union-attr]
    words = found.headline("b")
    assert words and words.log and words.weights is not None and words.weights.tolist() == [4, 6]
    assert found.figures["c", "perplexity", None].log
    assert found.figures["d", "f1", None].sums is None and found.headline("d") is None
    length = found.headline("e")
    assert length and length.value == 0.75 and len(length.keys) == 2
    assert found.figures["a", "acc", None].keys[0] == "a0p" and found.figures["a", "acc", None].num_fewshot == 5


def test_pairs_and_gates(tmp_path: Path) -> None:
    right = [1.0] * 80 + [0.0] * 20
    worse = [1.0] * 55 + [0.0] * 45
    child = written(tmp_path / "child", {"a": {"acc": worse}, "b": {"acc": right}})
    parent = written(tmp_path / "parent", {"a": {"acc": right}, "b": {"acc": right}})
    judged = correct(compare_tasks(child, parent))
    first, second = (one.comparison for one in judged)
    assert first.paired and first.paired.difference == -0.25 and first.damage == 0.25
    assert (first.paired.gained, first.paired.lost, first.paired.test) == (0, 25, "mcnemar")
    assert first.paired.p_holm == pytest.approx(2 * 2 * 0.5**25)
    assert second.paired and second.paired.p_holm == 1 and second.damage == 0
    assert [gate.passed for gate in damage_gates(judged, 0.1)] == [False, True]
    assert [gate.passed for gate in damage_gates(judged, 0.2)] == [True, True]  # lost more, but not beyond doubt


def test_perplexity_is_judged_by_its_logarithm() -> None:
    generator = torch.Generator().manual_seed(0)
    parent = 100 + 20 * torch.rand(30, generator=generator)
    judged = compare_perplexity("heldout", parent * 1.02, parent, tokens=50)
    one = judged.comparison
    assert one.parent and one.parent.value == pytest.approx(math.exp(float(parent.mean()) / 50), rel=1e-5)
    assert one.paired and one.paired.difference == pytest.approx(
        math.log(one.child.value / one.parent.value), rel=1e-5
    )
    assert one.damage == pytest.approx(one.child.value / one.parent.value - 1, rel=1e-5)
    assert judged.exceeds(0.01) < 0.05 < judged.exceeds(0.06)


def test_a_group_stands_for_its_tasks(tmp_path: Path) -> None:
    tasks = {"a": {"acc": ACC}, "b": {"acc": [1.0, 0.0]}}
    more = {"group_subtasks": {"all": ["some", "b"], "some": ["a"]}, "groups": {"all": {"acc,none": 5 / 8}}}
    child = written(tmp_path / "child", tasks, **more)
    found = [one.comparison for one in compare_tasks(child, child)]
    assert [(one.task, one.headline, one.group) for one in found] == [
        ("all", True, None), ("a", False, "all"), ("b", False, "all"),
    ]  # fmt: skip
    assert found[0].samples == 8 and found[0].child.value == 5 / 8
    # Weighed otherwise by lm-eval, the group has no pairs of its own, and its tasks speak for themselves.
    other = written(tmp_path / "other", tasks, **more | {"groups": {"all": {"acc,none": 7 / 12}}})
    assert [one.comparison.headline for one in compare_tasks(other, other)] == [True, True]


def test_other_questions_are_refused(tmp_path: Path) -> None:
    one = written(tmp_path / "one", {"a": {"acc": ACC}})
    other = written(tmp_path / "other", {"a": {"acc": ACC[:-1]}})
    assert same_questions(one, one) and not same_questions(one, other)
    with pytest.raises(HeadwiseError, match="different questions"):
        compare_tasks(one, other)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="holds no results"):
        read(tmp_path)
