"""Put an evaluation into the model card of the folder that was evaluated, for readers and for the Hub."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from headwise.errors import HeadwiseError
from headwise.eval.model import content_hash
from headwise.eval.report import report, tables
from headwise.eval.result import Comparison, Evaluation
from headwise.eval.verdict import is_perplexity, judge, name
from headwise.io.source import files_of
from headwise.records.card import EVALUATION, with_section


@dataclass(frozen=True)
class CardUpdate:
    """What was written: the card, how many figures its `model-index` holds, and the files of `.eval_results`."""

    card: Path
    figures: int
    eval_results: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "card": str(self.card),
            "figures": self.figures,
            "eval_results": [str(p) for p in self.eval_results],
        }


def update_card(
    folder: str | Path, report_folder: str | Path, *, eval_results: Sequence[tuple[str, str, str]] = ()
) -> CardUpdate:
    """Write a report's figures into a folder's README.md: a section of the text, and `model-index` of its data.

    Args:
        folder: the model that was evaluated, unchanged since.
        report_folder: what `headwise eval` wrote.
        eval_results: (task, dataset on the Hub, its task id): figures to write as `.eval_results/TASK.yaml` too,
            which the Hub shows with the model and with the benchmark, whose eval.yaml names the task ids.

    Raises:
        HeadwiseError: there is no card or no report, they are of two models, or a task is not in the report.
    """
    home = Path(folder).expanduser()
    path = home / "README.md"
    if not path.is_file():
        raise HeadwiseError(f"{home} has no README.md.", "Name the folder that `headwise convert` wrote.")
    found = report.read_report(report_folder)
    if content_hash(files_of(str(home), home)) != found.child.sha256:
        raise HeadwiseError(
            f"{report_folder} is a report of {found.child.model} as it was then, not of {home} as it is now.",
            f"Measure it: headwise eval {home} --baseline MODEL",
        )
    entries = [_entry(found, *wanted) for wanted in eval_results]
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise HeadwiseError(f"The front matter of {path} cannot be read: {str(error).splitlines()[0]}.") from None
    configs = _task_configs(found, Path(report_folder).expanduser())
    figures = [_figure(one, configs.get(one.task, {})) for one in found.headlines]
    card.data["model_name"] = home.resolve().name
    card.data["eval_results"] = figures or None
    _replace(path, with_section(str(card), EVALUATION, section(found), before="Errors"))
    written = []
    for task, entry in entries:
        file = home / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.yaml"
        file.parent.mkdir(exist_ok=True)
        _replace(file, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
        written.append(file)
    return CardUpdate(path, len(figures), tuple(written))


def section(found: Evaluation) -> str:
    """The card's section: the verdict, the main figures, the agreement, the command, the limits."""
    lines = [f"**{judge(found).text}**", ""]
    if found.comparisons:
        lines += [*report.figures_table(found, headlines=True), ""]
        if found.parent is not None:
            lines += ["Child minus parent on the same samples; bold stands at 5% after Holm's correction.", ""]
    alike = [
        f"{label}: {number} ({meaning})" for label, number, meaning in tables.agreement(found) if "KV" not in label
    ]
    lines += [f"- {line}" for line in alike] + [""] * bool(alike)
    lines += ["```", _published(found), "```", "", "What it does not say:", ""]
    return "\n".join([*lines, *(f"- {limit}" for limit in report.limits(found))])


def _published(found: Evaluation) -> str:
    """The command, without where a user keeps files: a folder is named by the last part of its path."""
    subjects = [found.child, *([found.parent] if found.parent else [])]
    folders = {subject.model for subject in subjects if subject.revision is None}
    words = shlex.split(found.command)
    return shlex.join(Path(word).name if word in folders or Path(word).is_absolute() else word for word in words)


def _figure(one: Comparison, config: dict[str, Any]) -> EvalResult:
    """An entry of `model-index`."""
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=str(config.get("dataset_path") or one.task),
        dataset_name=name(one).removesuffix(" perplexity") if is_perplexity(one) else one.task,
        dataset_config=config.get("dataset_name"),
        dataset_split=config.get("test_split") or config.get("validation_split"),
        metric_type=one.metric,
        metric_name=f"{one.metric} ({one.num_fewshot}-shot)" if one.num_fewshot is not None else one.metric,
        metric_value=round(one.child.value, 6),
    )


def _entry(found: Evaluation, task: str, dataset: str, task_id: str) -> tuple[str, EvalResultEntry]:
    """An entry of `.eval_results`, in percent as the benchmarks have them."""
    one = next((one for one in found.headlines if one.task == task), None)
    if one is None:
        there = ", ".join(one.task for one in found.headlines)
        raise HeadwiseError(f"The report has no task {task!r}, but {there or 'none at all'}.")
    if found.settings.get("limit"):
        raise HeadwiseError(
            "The report was made from a part of the samples (--limit), which is no benchmark's result.",
            "Measure without --limit, or leave out --eval-result.",
        )
    if is_perplexity(one) or not 0 <= one.child.value <= 1:
        raise HeadwiseError(f"{task} is measured by {one.metric}, which is no share that a benchmark could list.")
    harness = found.versions.get("lm_eval") or found.versions.get("lm-eval")
    notes = f"{one.metric}, {one.num_fewshot or 0}-shot" + (f", lm-eval {harness}" if harness else "")
    return task, EvalResultEntry(dataset, task_id, round(100 * one.child.value, 2), notes=notes)


def _task_configs(found: Evaluation, folder: Path) -> dict[str, dict[str, Any]]:
    """What lm-eval's own result file says of each task's data; nothing where the logs are not there."""
    logs = found.logs.get("child")
    configs: dict[str, dict[str, Any]] = {}
    for file in sorted((folder / logs).rglob("results_*.json")) if logs else ():
        content = json.loads(file.read_text(encoding="utf-8"))
        configs |= {task: _words(config) for task, config in content.get("configs", {}).items()}
    return configs


def _words(config: Any) -> dict[str, str]:
    def pairs() -> Iterator[tuple[str, str]]:
        for key in ("dataset_path", "dataset_name", "test_split", "validation_split"):
            if isinstance(config.get(key), str):
                yield key, config[key]

    return dict(pairs()) if isinstance(config, dict) else {}


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8", newline="")
    os.replace(fresh, path)
