"""Figures and samples from lm-eval's own result files: what each metric of each task is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError

# Of several metrics, the one that stands for the task.
HEADLINES = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class Figure:
    """One metric of one task.

    Attributes:
        sums, weights: for each sample, so that the figure is sum(sums) / sum(weights) or, for a perplexity, exp of
            its negative; None where lm-eval makes it otherwise. Weights are ones unless the task counts words.
        log: whether it is a perplexity; `sums` are then log-likelihoods.
        keys: the samples' questions and prompts, hashed by lm-eval.
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

    @property
    def is_share(self) -> bool:
        """Whether every sample is between wrong (0) and right (1), so that a point is a point."""
        return self.sums is not None and not self.log and bool(((self.sums >= 0) & (self.sums <= 1)).all())

    @property
    def is_binary(self) -> bool:
        """Whether every sample is either wrong (0) or right (1)."""
        return self.sums is not None and self.is_share and bool(((self.sums == 0) | (self.sums == 1)).all())


@dataclass(frozen=True)
class Results:
    """One model's figures by (task, metric, filter), the outermost groups of tasks, and what was logged."""

    figures: dict[tuple[str, str, str | None], Figure]
    groups: dict[str, tuple[str, ...]]
    group_values: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]

    def headline(self, task: str) -> Figure | None:
        """The figure that stands for a task: HEADLINES first, else the first that can be compared by pairs."""
        own = [f for f in self.figures.values() if f.task == task and f.sums is not None]
        own = [f for f in own if f.higher_is_better is not None and (f.log or f.is_share)]
        own.sort(key=lambda f: HEADLINES.index(f.metric) if f.metric in HEADLINES else len(HEADLINES))
        return own[0] if own else None


def read(folder: Path) -> Results:
    """Read the files that lm-eval wrote for one model.

    Raises:
        HeadwiseError: there are no results.
    """
    files = sorted(folder.glob("results_*.json"))
    if not files:
        raise HeadwiseError(f"{folder} holds no results of lm-eval.", "Run the evaluation again.")
    found = json.loads(files[-1].read_text(encoding="utf-8"))
    logged = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        with path.open(encoding="utf-8") as lines:
            logged[task] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    figures = {
        (figure.task, figure.metric, figure.filter): figure
        for task, samples in logged.items()
        for figure in _figures(task, found, samples)
    }
    return Results(figures, _outermost(found.get("group_subtasks", {})), found.get("groups", {}), logged)


def _outermost(subtasks: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """The groups that are in no other, each with all tasks within it."""

    def tasks(name: str) -> Iterator[str]:
        for inner in subtasks[name]:
            yield from tasks(inner) if inner in subtasks else [inner]

    inside = {inner for names in subtasks.values() for inner in names}
    return {name: tuple(tasks(name)) for name, inner in subtasks.items() if inner and name not in inside}


def _figures(task: str, found: dict[str, Any], samples: list[dict[str, Any]]) -> Iterator[Figure]:
    values = found["results"][task]
    direction = found.get("higher_is_better", {}).get(task, {})
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        own = [sample for sample in samples if sample["filter"] == filter_name and metric in sample]
        error = values.get(f"{metric}_stderr,{filter_name}")
        version = found.get("versions", {}).get(task)
        figure = Figure(
            task=task,
            metric=metric,
            filter=None if filter_name == "none" else filter_name,
            value=float(value),
            standard_error=float(error) if isinstance(error, int | float) else None,
            higher_is_better=direction.get(metric),
            num_fewshot=found.get("n-shot", {}).get(task),
            version=None if version is None else str(version),
            keys=tuple(sample["doc_hash"] + sample["prompt_hash"] for sample in own),
        )
        yield _with_samples(figure, [sample[metric] for sample in own])


def _with_samples(figure: Figure, values: list[Any]) -> Figure:
    """The figure with the samples it is made of, if some way to put them together gives lm-eval's own value."""
    try:
        table = torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError):  # texts, or lists of unlike length: F1, BLEU
        return figure
    if not len(table):
        return figure
    pairs = table.dim() == 2 and table.shape[1] == 2
    if not (table.dim() == 1 or pairs):
        return figure
    sums, weights = (table[:, 0], table[:, 1]) if pairs else (table, torch.ones_like(table))
    keys = figure.keys
    # Some tasks mark samples that do not count for a metric.
    if not pairs and bool((sums == -1).any()) and bool((sums != -1).any()):
        counted = sums != -1
        if _close(float(sums[counted].mean()), figure.value):
            sums, weights = sums[counted], weights[counted]
            keys = tuple(key for key, kept in zip(keys, counted.tolist(), strict=True) if kept)
    ratio = float(sums.sum() / weights.sum())
    for log in (False, True):
        if _close(math.exp(min(-ratio, 700)) if log else ratio, figure.value):
            return replace(figure, keys=keys, sums=sums, weights=weights, log=log)
    return figure


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
