"""`evaluate`: the one way headwise measures what a conversion cost.

Parent and child are measured one after the other, then together where the recipe asks for it; what was found is
compared, judged, and published as a report's folder by one rename.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from headwise.errors import HeadwiseError
from headwise.eval import model as models
from headwise.eval import processes
from headwise.eval import settings as recipes
from headwise.eval.assemble import assemble
from headwise.eval.metrics.inputs import make_material, task_arguments
from headwise.eval.pair import Run, versions
from headwise.eval.report.publish import check_report, published
from headwise.eval.report.report import write_report
from headwise.eval.result import Evaluation
from headwise.eval.settings import Recipe
from headwise.eval.tasks.harness import BACKENDS, Harness, Options
from headwise.progress import SILENT, Progress

# Tokens in lm-eval's batches on a CPU, where looking for the largest that fits would take longer than the work.
CPU_BATCH = 16


def evaluate_model(
    child: str | Path,
    baseline: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    tasks: Sequence[str] = (),
    online: bool = False,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str | None = None,
    include_path: Sequence[str | Path] = (),
    backend: str = "hf",
    fail_above: float | None = None,
    report: str | Path | None = None,
    force: bool = False,
    cache: bool = True,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Evaluation | None:
    """Measure a model, beside its parent where one is named, and write a report.

    Args:
        child, baseline: folders, or `org/name[@revision]`.
        recipe: the name of one in the library (quick, standard, long-context) or a YAML file. None: quick, or only
            `tasks` where these are given.
        tasks: names or patterns of lm-eval's tasks, or YAML files; measured beside those of the recipe.
        online: also the recipe's tasks that download their questions.
        num_fewshot, limit, batch_size: lm-eval's own; None: the recipe's and the tasks' own. A `batch_size` is a
            number or "auto", which is the default on a GPU.
        include_path: folders with tasks of your own.
        backend: what runs the tasks, "hf" (transformers) or "vllm".
        fail_above: a damage (0.01: one point, or 1% of perplexity) that no headline figure may exceed.
        report: the folder to write; None: NAME-eval in the working folder.
        force: replace that folder if it exists.
        cache: use and keep the parent's results.
        dtype: "float32", "bfloat16", "float16" or "auto" (config.json's); None: auto on a GPU, else float32.
        device: None: CUDA when it is there.
        seed: of everything random.
        token: for the Hub.

    Returns:
        What was found; None in a process of `accelerate launch` that only helps.

    Raises:
        HeadwiseError: no such model, recipe or task; parent and child have different tokenizers; a task needs the
            network; the report's folder exists.
    """
    chosen = _choose(recipe, tasks, online, num_fewshot, limit)
    if backend not in BACKENDS:
        raise HeadwiseError(f"There is no backend {backend!r}.", f"There are: {', '.join(BACKENDS)}.")
    if backend == "vllm" and processes.count() > 1:
        raise HeadwiseError("vLLM spreads its work itself.", "Run headwise without accelerate launch.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(
        num_fewshot=chosen.num_fewshot,
        limit=chosen.limit,
        batch_size=batch_size or (CPU_BATCH if device == "cpu" else "auto"),
        backend=backend,
        dtype=dtype or ("float32" if device == "cpu" else "auto"),
        device=device,
        seed=seed,
    )
    progress = progress if processes.is_main() else SILENT
    ours = models.find(child, token=token, progress=progress)
    theirs = None if baseline is None else models.find(baseline, token=token, progress=progress)
    out = Path(report) if report is not None else Path(f"{ours.name.replace('/', '--')}-eval")
    check_report(out, force)
    tokenizer = models.tokenizer_of(ours)
    if theirs is not None and not models.same_tokenizer(tokenizer, models.tokenizer_of(theirs)):
        raise HeadwiseError(
            f"{child} and {baseline} have different tokenizers, so their tokens cannot be compared.",
            "The baseline must be the model that was converted, or one with its tokenizer.",
        )
    folders = [Path(folder).expanduser() for folder in include_path]
    for folder in folders:
        if not folder.is_dir():
            raise HeadwiseError(f"There is no folder {folder}.", "--include-path takes a folder with tasks.")
    harness = None
    if chosen.tasks:
        harness = Harness(
            chosen.tasks, include=folders, tokenizer=tokenizer, metadata=task_arguments(chosen, ours.context, seed)
        )
    material = make_material(chosen, tokenizer, ours.context, seed)
    with processes.together(), published(out, force) as work:
        run = Run(chosen, options, harness, material, ours, theirs, work, progress, {})
        mine = run.alone("child", ours)
        parents, reused = run.parent(mine, folders, cache)
        if mine is None:
            return None
        diagnostics, acceptance = run.together() if theirs is not None else (None, None)
        found = assemble(run, mine, parents, diagnostics, acceptance, tokenizer, fail_above)
        found = replace(
            found,
            recipe=None if recipe is None and tasks else Path(recipe or "quick").stem,
            command=_command(child, baseline, recipe, tasks, online, options, chosen, folders, fail_above, report),
            settings=_settings(chosen, options, folders),
            reused=reused,
            versions=versions(),
        )
        found = write_report(found, work)
    progress.finish()
    fixed = sorted({one.task for one in found.comparisons if one.num_fewshot not in (None, options.num_fewshot)})
    if options.num_fewshot is not None and fixed:
        progress.warn(f"--num-fewshot has no effect on {', '.join(fixed)}, which set their own number of examples.")
    progress.note(f"Report: {out}")
    return found


def _choose(
    name: str | Path | None, tasks: Sequence[str], online: bool, num_fewshot: int | None, limit: float | None
) -> Recipe:
    """The recipe, with what was asked for besides."""
    chosen = recipes.load(name or "quick") if name or not tasks else Recipe(about="Tasks by name.")
    if online and not chosen.online:
        raise HeadwiseError(
            f"The recipe {name or 'quick'} has no tasks that --online would add.", "Leave out --online."
        )
    return replace(
        chosen,
        tasks=list(dict.fromkeys([*chosen.tasks, *(chosen.online if online else ()), *tasks])),
        num_fewshot=chosen.num_fewshot if num_fewshot is None else num_fewshot,
        limit=chosen.limit if limit is None else limit,
    )


def _settings(chosen: Recipe, options: Options, folders: Sequence[Path]) -> dict[str, Any]:
    return {
        **asdict(options),
        "tasks": chosen.tasks,
        "include_path": [str(folder) for folder in folders],
        "recipe": recipes.settings_of(chosen),
    }


def _command(
    child: Any, baseline: Any, name: Any, tasks: Sequence[str], online: bool, options: Options, chosen: Recipe,
    folders: Sequence[Path], fail_above: float | None, report: Any,
) -> str:  # fmt: skip
    """The command line that repeats this."""
    words = ["headwise", "eval", str(child)]
    typed = {
        "--baseline": baseline,
        "--recipe": name or (None if tasks else "quick"),
        "--tasks": ",".join(tasks) or None,
        "--num-fewshot": options.num_fewshot,
        "--limit": options.limit,
        "--batch-size": options.batch_size,
        "--backend": None if options.backend == "hf" else options.backend,
        "--dtype": options.dtype,
        "--device": options.device,
        "--seed": options.seed,
        "--fail-above": None if fail_above is None else f"{fail_above:.6g}",
        "--report": report,
    }
    for flag, value in typed.items():
        words += [flag, str(value)] if value is not None else []
    for folder in folders:
        words += ["--include-path", str(folder)]
    return shlex.join([*words, "--online"] if online else words)
