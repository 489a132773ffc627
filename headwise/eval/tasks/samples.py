"""Read figures and samples from lm-eval's result files and find the samples that each metric consists of."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.eval.tasks.answers import AnswerCounts, question_key, read_counts

# The main figure of a task is the first of these metrics that it has.
HEADLINES = ("acc_norm", "acc", "exact_match")
# Fields of a question that hold the passage which several questions share.
PASSAGES = ("passage", "article", "paragraph", "story", "context")


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task, of one model.

    Attributes:
        task: lm-eval's name of the task.
        metric: lm-eval's name of the metric.
        filter: lm-eval's filter; None for its default.
        value: the figure.
        standard_error: sampling error; None where lm-eval gives none.
        higher_is_better: direction of the figure; None where lm-eval gives none.
        num_fewshot: examples in the prompt.
        version: version of the task.
        keys: hash of question and prompt of each sample.
        sums: value of each sample, (samples,). The figure is sum(sums) / sum(weights), or exp of the negative ratio
            for a perplexity. None where lm-eval computes the figure in another way.
        weights: weight of each sample, (samples,): 1, or the number of words that the task counts.
        log: whether the figure is a perplexity; `sums` are then log-likelihoods.
        passages: the passage of each sample by its key; empty where the task has none.
    """

    task: str
    metric: str
    filter: str | None
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    version: str | None
    keys: tuple[str, ...]
    sums: Tensor | None = None
    weights: Tensor | None = None
    log: bool = False
    passages: Mapping[str, str] = field(default_factory=dict)

    @property
    def clusters(self) -> tuple[str, ...]:
        """Return the passage of each sample; empty unless at least two samples share one."""
        clusters = tuple(self.passages.get(key, key) for key in self.keys)
        return clusters if len(set(clusters)) < len(set(self.keys)) else ()

    @property
    def is_share(self) -> bool:
        """Return whether every sample is between wrong (0) and right (1)."""
        return self.sums is not None and not self.log and bool(((self.sums >= 0) & (self.sums <= 1)).all())

    @property
    def is_binary(self) -> bool:
        """Return whether every sample is either wrong (0) or right (1)."""
        return self.sums is not None and self.is_share and bool(((self.sums == 0) | (self.sums == 1)).all())


@dataclass(frozen=True)
class TaskResults:
    """All task figures of one model.

    Attributes:
        figures: (task, metric, filter) -> figure.
        groups: outermost groups of tasks -> the tasks in them.
        group_values: group -> lm-eval's own figures of it.
        samples: task -> logged samples.
        answers: task -> what was counted of its answers.
    """

    figures: dict[tuple[str, str, str | None], TaskFigure]
    groups: dict[str, tuple[str, ...]]
    group_values: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    answers: dict[str, AnswerCounts] = field(default_factory=dict)

    def headline(self, task: str) -> TaskFigure | None:
        """Return the main figure of a task: a metric of HEADLINES, else the first one that pairs can compare.

        Args:
            task: lm-eval's name of the task.
        """
        candidates = [
            figure
            for figure in self.figures.values()
            if figure.task == task
            and figure.sums is not None
            and figure.higher_is_better is not None
            and (figure.log or figure.is_share)
        ]
        candidates.sort(key=lambda f: HEADLINES.index(f.metric) if f.metric in HEADLINES else len(HEADLINES))
        return candidates[0] if candidates else None


def read_results(folder: Path) -> TaskResults:
    """Read the files that lm-eval wrote for one model.

    Args:
        folder: the folder with lm-eval's files.

    Returns:
        The figures and the logged samples.

    Raises:
        HeadwiseError: there are no results.
    """
    files = sorted(folder.glob("results_*.json"))
    if not files:
        raise HeadwiseError(f"{folder} holds no results of lm-eval.", "Run the evaluation again.")
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    logged = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        with path.open(encoding="utf-8") as lines:
            logged[task] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    figures = {
        (figure.task, figure.metric, figure.filter): figure
        for task, samples in logged.items()
        for figure in _figures(task, results, samples)
    }
    groups = _outermost(results.get("group_subtasks", {}))
    return TaskResults(figures, groups, results.get("groups", {}), logged, read_counts(folder))


def _outermost(subtasks: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Return the groups that are in no other group, each with all tasks within it."""

    def tasks(name: str) -> Iterator[str]:
        for inner in subtasks[name]:
            yield from tasks(inner) if inner in subtasks else [inner]

    nested = {inner for names in subtasks.values() for inner in names}
    return {name: tuple(tasks(name)) for name, inner in subtasks.items() if inner and name not in nested}


def _figures(task: str, results: dict[str, Any], samples: list[dict[str, Any]]) -> Iterator[TaskFigure]:
    values = results["results"][task]
    direction = results.get("higher_is_better", {}).get(task, {})
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        measured = [sample for sample in samples if sample["filter"] == filter_name and metric in sample]
        error = values.get(f"{metric}_stderr,{filter_name}")
        version = results.get("versions", {}).get(task)
        figure = TaskFigure(
            task=task,
            metric=metric,
            filter=None if filter_name == "none" else filter_name,
            value=float(value),
            standard_error=float(error) if isinstance(error, int | float) else None,
            higher_is_better=direction.get(metric),
            num_fewshot=results.get("n-shot", {}).get(task),
            version=None if version is None else str(version),
            keys=tuple(map(question_key, measured)),
            passages=_passages(measured),
        )
        yield _with_samples(figure, [sample[metric] for sample in measured])


def _passages(samples: list[dict[str, Any]]) -> dict[str, str]:
    """Return the hash of the passage of each question by its key; empty unless every question has one."""
    documents = [doc if isinstance(doc := sample.get("doc"), dict) else {} for sample in samples]
    name = next((name for name in PASSAGES if all(isinstance(doc.get(name), str) for doc in documents)), None)
    if name is None:
        return {}
    return {
        question_key(sample): hashlib.sha256(doc[name].encode()).hexdigest()
        for sample, doc in zip(samples, documents, strict=True)
    }


def _with_samples(figure: TaskFigure, values: list[Any]) -> TaskFigure:
    """Add the samples to a figure, if a mean, a weighted mean or a perplexity of them equals lm-eval's value."""
    try:
        table = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError):  # texts, or lists of different length: F1, BLEU
        return figure
    if not len(table):
        return figure
    weighted = table.dim() == 2 and table.shape[1] == 2
    if not (table.dim() == 1 or weighted):
        return figure
    sums, weights = (table[:, 0], table[:, 1]) if weighted else (table, torch.ones_like(table))
    keys = figure.keys
    # Some tasks mark samples that do not count for a metric with -1.
    if not weighted and bool((sums == -1).any()) and bool((sums != -1).any()):
        counted = sums != -1
        if _is_close(float(sums[counted].mean()), figure.value):
            sums, weights = sums[counted], weights[counted]
            keys = tuple(key for key, counts in zip(keys, counted.tolist(), strict=True) if counts)
    ratio = float(sums.sum() / weights.sum())
    for log in (False, True):
        if _is_close(math.exp(min(-ratio, 700)) if log else ratio, figure.value):
            return replace(figure, keys=keys, sums=sums, weights=weights, log=log)
    return figure


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
