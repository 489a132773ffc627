"""Write the figures of an evaluation into the model card of the evaluated folder, for readers and for the Hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from headwise.errors import HeadwiseError
from headwise.eval.model import content_hash
from headwise.eval.report import tables
from headwise.eval.report.publish import REPORT
from headwise.eval.report.report import figures_table, limits, read_report
from headwise.eval.result import Comparison, Evaluation
from headwise.eval.verdict import figure_name, verdict_of
from headwise.format import public_command
from headwise.io.fs import check_name, require_folder
from headwise.io.source import path_inside, read_json, source_in_folder
from headwise.io.workdir import write_file_atomically
from headwise.records.card import EVALUATION, read_card, with_section

AGAIN = "Run `headwise eval` again."
# Largest result file of lm-eval, in bytes; its samples are in files of their own.
MAX_RESULTS = 100_000_000
TASK_FIELDS = ("dataset_path", "dataset_name", "test_split", "validation_split")


@dataclass(frozen=True)
class CardUpdate:
    """What `update_card` wrote.

    Attributes:
        card: the model card.
        figures: number of figures in its `model-index`.
        eval_results: files in `.eval_results`.
    """

    card: Path
    figures: int
    eval_results: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "card": str(self.card),
            "figures": self.figures,
            "eval_results": [str(p) for p in self.eval_results],
        }


def update_card(
    folder: str | Path, report_folder: str | Path, *, eval_results: Sequence[tuple[str, str, str]] = ()
) -> CardUpdate:
    """Write the figures of a report into a folder's README.md: a section of the text and `model-index` of the data.

    Args:
        folder: the model that was evaluated, unchanged since then.
        report_folder: the folder that `evaluate_model` wrote.
        eval_results: (task, dataset on the Hub, its task id): figures to write into `.eval_results/TASK.yaml` too.
            The Hub shows them with the model and with the benchmark, whose eval.yaml lists the task ids.

    Returns:
        The files and the number of figures.

    Raises:
        HeadwiseError: there is no card or no report, they are of two models, or a task is not in the report.
    """
    for path in (folder, report_folder):
        check_name(path)
    home = Path(folder).expanduser()
    path = home / "README.md"
    remedy = "Name the folder that `headwise convert` or `headwise uptrain` wrote."
    require_folder(home, remedy)
    if not path.is_file():
        raise HeadwiseError(f"{home} has no README.md.", remedy)
    evaluation = read_report(report_folder)
    if content_hash(source_in_folder(str(home), home)) != evaluation.child.sha256:
        raise HeadwiseError(
            f"{report_folder} is the report of {evaluation.child.model} at that time, not of {home} as it is now.",
            "Run `headwise eval` on the folder again.",
        )
    entries = [_eval_result(evaluation, *benchmark) for benchmark in eval_results]
    metadata, body = read_card(path)
    configs = _task_configs(evaluation, Path(report_folder).expanduser())
    figures = [_model_index_entry(c, configs.get(c.task, {})) for c in evaluation.headlines]
    card = _with_figures(path, metadata, home.resolve().name, figures)
    text = with_section(f"{card}{body}", EVALUATION, evaluation_section(evaluation), before="Errors")
    # JSON can hold halves of surrogate pairs, which no file can.
    write_file_atomically(path, text.encode(errors="replace"))
    files = []
    for task, entry in entries:
        file = home / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.yaml"
        path_inside(home, ".eval_results")
        file.parent.mkdir(exist_ok=True)
        entry_yaml = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        write_file_atomically(file, entry_yaml.encode())
        files.append(file)
    return CardUpdate(path, len(figures), tuple(files))


def _with_figures(path: Path, metadata: dict[str, Any], name: str, figures: list[EvalResult]) -> str:
    """Return the front matter of a card with its `model-index` replaced."""
    kept = {key: value for key, value in metadata.items() if key != "model-index"}
    try:
        data = ModelCardData(**kept)
        data["model_name"], data["eval_results"] = name, figures or None
        return f"---\n{data.to_yaml(original_order=list(metadata))}\n---\n"
    # Hugging Face's class raises whatever its handling of an odd value raises.
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise HeadwiseError(
            f"The front matter of {path} cannot be written again: {reason}.", "Correct or delete it."
        ) from error


def evaluation_section(evaluation: Evaluation) -> str:
    """Render the section of a model card: verdict, main figures, agreement, command, limits.

    Args:
        evaluation: the whole result.

    Returns:
        Markdown without the heading.
    """
    lines = [f"**{verdict_of(evaluation).text}**", ""]
    if evaluation.comparisons:
        lines += [*figures_table(evaluation, headlines=True), ""]
        if evaluation.parent is not None:
            lines += [
                "Child minus parent on the same samples; bold: significant at 5% after Holm's correction.",
                "",
            ]
    agreement = [
        f"- {label}: {number} ({explanation})"
        for label, number, explanation in tables.agreement_rows(evaluation)
        if "KV" not in label
    ]
    lines += agreement + [""] * bool(agreement)
    lines += ["```", _public_command(evaluation), "```", "", "Limits of these figures:", ""]
    return "\n".join([*lines, *(f"- {limit}" for limit in limits(evaluation))])


def _public_command(evaluation: Evaluation) -> str:
    """Return the command with every absolute path shortened to its last part, whoever wrote the report."""
    try:
        return public_command(shlex.split(evaluation.command))
    except (ValueError, AttributeError):
        raise HeadwiseError("The `command` of report.json is not a command line.", AGAIN) from None


def _model_index_entry(comparison: Comparison, config: dict[str, Any]) -> EvalResult:
    task, shots = comparison.task, comparison.num_fewshot
    if comparison.is_perplexity:
        task = figure_name(comparison).removesuffix(" perplexity")
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=str(config.get("dataset_path") or comparison.task),
        dataset_name=task,
        dataset_config=config.get("dataset_name"),
        dataset_split=config.get("test_split") or config.get("validation_split"),
        metric_type=comparison.metric,
        metric_name=f"{comparison.metric} ({shots}-shot)" if shots is not None else comparison.metric,
        metric_value=round(comparison.child.value, 6),
    )


def _eval_result(evaluation: Evaluation, task: str, dataset: str, task_id: str) -> tuple[str, EvalResultEntry]:
    """Return an entry of `.eval_results`, in percent as benchmarks list it."""
    comparison = next((c for c in evaluation.headlines if c.task == task), None)
    if comparison is None:
        tasks = ", ".join(c.task for c in evaluation.headlines)
        raise HeadwiseError(f"The report has no task {task!r}; its tasks: {tasks or 'none'}.")
    if evaluation.settings.get("limit"):
        raise HeadwiseError(
            f"The report used a part of the samples (`limit` {evaluation.settings['limit']}), so {task} is not the "
            "result of a benchmark.",
            "Evaluate without `limit`, or leave out `eval_results`.",
        )
    if comparison.is_perplexity or not 0 <= comparison.child.value <= 1:
        raise HeadwiseError(
            f"{task} has the metric {comparison.metric}, which is not a share from 0 to 1 as benchmarks list it."
        )
    harness = evaluation.versions.get("lm_eval") or evaluation.versions.get("lm-eval")
    shots = comparison.num_fewshot or 0
    notes = f"{comparison.metric}, {shots}-shot" + (f", lm-eval {harness}" if harness else "")
    return task, EvalResultEntry(dataset, task_id, round(100 * comparison.child.value, 2), notes=notes)


def _task_configs(evaluation: Evaluation, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the dataset of each task from lm-eval's result files; empty without the files."""
    logs = evaluation.logs.get("child") if isinstance(evaluation.logs, dict) else None
    if not logs:
        return {}
    if not isinstance(logs, str) or Path(logs).is_absolute() or ".." in Path(logs).parts:
        raise HeadwiseError(
            f"{folder / REPORT} names {logs!r} as `logs.child`, which is not a folder of the report.",
            AGAIN,
        )
    home = folder if folder.is_dir() else folder.parent
    configs: dict[str, dict[str, Any]] = {}
    for file in sorted(path_inside(home, logs).rglob("results_*.json")):
        found = read_json(home, file.relative_to(home).as_posix(), MAX_RESULTS).get("configs")
        if isinstance(found, dict):
            configs |= {str(task): _task_fields(config) for task, config in found.items()}
    return configs


def _task_fields(config: Any) -> dict[str, str]:
    def pairs() -> Iterator[tuple[str, str]]:
        for key in TASK_FIELDS:
            if isinstance(config.get(key), str):
                yield key, config[key]

    return dict(pairs()) if isinstance(config, dict) else {}
