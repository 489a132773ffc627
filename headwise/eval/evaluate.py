"""Evaluate a converted model: `evaluate_model` is the one path by which headwise measures a loss of quality.

Child and parent are measured one after the other, then together where the recipe needs both. The measurements are
compared, gated and published as a report's folder by one rename.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise.environment import find_device
from headwise.errors import HeadwiseError, SettingError
from headwise.eval import processes
from headwise.eval.assemble import assemble
from headwise.eval.metrics.inputs import make_image_inputs, make_inputs, make_pair_inputs, task_arguments
from headwise.eval.model import EvalModel, find_model, same_tokenizer
from headwise.eval.pair import EvalPair, package_versions
from headwise.eval.report.publish import check_report, published
from headwise.eval.report.report import write_report
from headwise.eval.result import Evaluation
from headwise.eval.settings import EvalRecipe, EvalSettings
from headwise.eval.stats import require_packages
from headwise.eval.tasks.harness import Harness
from headwise.fields import settings_of
from headwise.format import public_data
from headwise.measure.image_prompts import VISION_CLASS
from headwise.progress import SILENT, Progress
from headwise.records.manifest import read_record
from headwise.records.parent import recorded_source


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
    task_data: str | Path | None = None,
    backend: str = "hf",
    apply_chat_template: bool = False,
    pairs: str | Path | None = None,
    images: str | Path | None = None,
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
    """Measure a model, compare it with its parent, and write a report.

    Args:
        child: a folder, or `org/name[@revision]`.
        baseline: the parent, a folder, a GGUF file or `org/name[@revision]`; None: the one that the record of
            `child` names, if it can be found. Nothing is compared without one.
        recipe: name of a recipe in the library (quick, standard, long-context, retrieval), or a YAML file. None:
            quick, or only `tasks` if they are given.
        tasks: names or patterns of lm-eval's tasks, or YAML files; they are added to those of the recipe.
        online: add the recipe's tasks that download their questions.
        num_fewshot: examples in each prompt; None: the recipe's, or each task's own.
        limit: questions of each task, a number or a share below 1; None: the recipe's.
        batch_size: batch size of lm-eval, a number, "auto" or "auto:N"; None: 16 on a CPU, "auto" on a GPU.
        include_path: folders with more tasks.
        task_data: folder with files such as hellaswag.jsonl, which the tasks headwise_hellaswag and others read in
            place of the Hub. The recipe's own tasks read them too; those without a file and without a reachable Hub
            are left out, and the report names them.
        backend: what runs the tasks, "hf" (transformers) or "vllm".
        apply_chat_template: put the questions of the tasks into the chat template, the same for both models.
        pairs: a `.jsonl` file with the texts "source" and "target" in every line. An encoder-decoder is measured by
            the perplexity of its targets, and by nothing else.
        images: a `.jsonl` file with the path of an "image" and a "text" in every line. A vision-language model is
            measured by the perplexity of the texts given their images and the chat template, and by its agreement
            with the parent at the tokens of the texts.
        fail_above: damage that the gate of each headline figure allows (0.01: one point, or 1% of perplexity).
        report: the folder to write; None: NAME-eval in the working folder.
        force: replace that folder if it exists.
        cache: reuse the parent's cached results, and cache new ones.
        dtype: "float32", "bfloat16", "float16" or "auto" (as config.json); None: "auto" on a GPU, else "float32".
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        seed: seed of everything random.
        token: token of the Hub.
        progress: receives the stages.

    Returns:
        The result; None in a process of `accelerate launch` that only computes its share of the tasks.

    Raises:
        SettingError: a setting is not legal or contradicts another one.
        HeadwiseError: there is no such model, recipe or task; parent and child have different tokenizers; a task
            needs the network; a package is not installed.
    """
    given = locals()
    settings = EvalSettings(**{name: given[name] for name in settings_of(EvalSettings)})
    chosen = settings.choose_recipe()
    if settings.backend == "vllm" and processes.num_processes() > 1:
        raise SettingError(
            "backend",
            f"`backend` is 'vllm', which distributes its work itself, in {processes.num_processes()} processes.",
            "Run headwise without accelerate launch.",
        )
    processes.check_device(settings.device)
    require_packages()
    settings = settings.resolve(chosen, str(find_device(settings.device)))
    progress = progress if processes.is_main() else SILENT
    ours = find_model(child, token=token, progress=progress)
    if baseline is None and (baseline := recorded_parent(ours, progress)) is not None:
        settings = replace(settings, baseline=baseline)
    theirs = None if baseline is None else find_model(baseline, token=token, progress=progress)
    check_kinds(settings, ours, theirs)
    out = settings.report or Path(f"{ours.name.replace('/', '--')}-eval")
    check_report(out, settings.force)
    tokenizer = ours.load_tokenizer()
    parent_tokenizer = None if theirs is None else theirs.load_tokenizer()
    if settings.apply_chat_template:
        check_chat_template(tokenizer, parent_tokenizer)
    if parent_tokenizer is not None and not same_tokenizer(tokenizer, parent_tokenizer):
        raise HeadwiseError(
            f"{child} and {baseline} have different tokenizers, so their tokens cannot be compared.",
            "The baseline must be the model that was converted, or one with its tokenizer.",
        )
    for folder in settings.include_path:
        if not folder.is_dir():
            raise SettingError("include_path", f"There is no folder {folder}.", "`include_path` names folders.")
    if settings.task_data is not None and not settings.task_data.expanduser().is_dir():
        raise SettingError(
            "task_data", f"There is no folder {settings.task_data}.", "`task_data` names a folder with questions."
        )
    harness = None
    if chosen.tasks:
        harness = Harness(
            chosen.tasks,
            include=settings.include_path,
            tokenizer=tokenizer,
            metadata=task_arguments(chosen, ours.context, settings.seed, settings.task_data),
            optional=optional_tasks(chosen, settings),
        )
    if settings.pairs is not None:
        inputs = make_pair_inputs(settings.pairs, tokenizer, ours, progress)
    elif settings.images is not None:
        inputs = make_image_inputs(settings.images, ours)
    else:
        inputs = make_inputs(chosen, tokenizer, ours.context, settings.seed)
    with processes.end_together(keeps_answers=settings.cache), published(out, settings.force) as work:
        processes.join(str(settings.device))
        pair = EvalPair(chosen, settings, harness, inputs, ours, theirs, work, progress)
        if processes.is_main():
            pair.announce(tokenizer)
        child_metrics = pair.measure_child()
        parent_metrics, reused = pair.measure_parent(child_metrics)
        if child_metrics is None:
            return None
        divergence, acceptance = pair.measure_together()
        evaluation = assemble(pair, child_metrics, parent_metrics, divergence, acceptance, tokenizer)
        name = settings.recipe_name
        evaluation = replace(
            evaluation,
            recipe=None if name is None else Path(name).stem,
            command=settings.command(child),
            settings=public_data(settings.recorded(chosen)),
            reused=reused,
            versions=package_versions(),
        )
        evaluation = write_report(evaluation, work)
    pair.discard_child()
    progress.finish()
    _warn_of_fixed_examples(evaluation, settings, progress)
    progress.note(f"Report: {out}")
    return evaluation


def check_kinds(settings: EvalSettings, child: EvalModel, parent: EvalModel | None) -> None:
    """Refuse models that the settings do not fit, and models of two kinds.

    Args:
        settings: of the evaluation.
        child: the child.
        parent: the parent; None without a baseline.

    Raises:
        HeadwiseError: an encoder-decoder has no pairs, the pairs are for another model, the models do not match,
            vLLM would get a GGUF file, or a gate has no parent.
    """
    for model in (child, parent):
        if settings.backend == "vllm" and model is not None and model.is_gguf:
            raise SettingError(
                "backend",
                f"`backend` is 'vllm', which takes no GGUF file such as {model.name}.",
                "Write it as a folder with `headwise convert FILE.gguf FOLDER`, or leave out `backend`.",
            )
    name = child.source.name
    if parent is None and settings.fail_above is not None:
        raise SettingError(
            "fail_above", f"`fail_above` is {settings.fail_above!r}, which needs a parent: give `baseline`."
        )
    if child.reads_pairs and settings.pairs is None:
        given = [f"`{option}`" for option in ("images", "recipe", "tasks") if getattr(settings, option)]
        raise SettingError(
            "pairs",
            f"{name} is an encoder-decoder, which is measured by the perplexity of targets given their sources.",
            f"Give `pairs`{' in place of ' if given else ''}{' and '.join(given)}.",
        )
    if settings.pairs is not None and not child.reads_pairs:
        sees = child.auto_class == VISION_CLASS
        kind = "vision-language model" if sees else "language model"
        raise SettingError(
            "pairs",
            f"{name} is a {kind} without an encoder of text, which reads no pairs.",
            "Give `images` in place of `pairs`." if sees else "Leave out `pairs`.",
        )
    if parent is not None and parent.reads_pairs != child.reads_pairs:
        raise HeadwiseError(
            f"Of {name} and {parent.source.name}, only one is an encoder-decoder.",
            "The baseline must be the model that was converted.",
        )
    if settings.images is not None and parent is not None and parent.auto_class != child.auto_class:
        raise HeadwiseError(
            f"Of {name} and {parent.source.name}, only one reads images.",
            "The baseline must be the model that was converted.",
        )


def check_chat_template(child: Any, parent: Any) -> None:
    """Refuse chat evaluation without a template, or with two templates.

    Args:
        child: tokenizer of the child.
        parent: tokenizer of the parent; None without a baseline.

    Raises:
        SettingError: there is no template, or there are two.
    """
    template = getattr(child, "chat_template", None)
    if not template:
        raise SettingError(
            "apply_chat_template", "`apply_chat_template` is True, and the model has no chat template."
        )
    if parent is not None and getattr(parent, "chat_template", None) != template:
        raise SettingError(
            "apply_chat_template",
            "`apply_chat_template` is True, and child and parent have different chat templates.",
            "Give the child the parent's chat_template.jinja.",
        )


def optional_tasks(recipe: EvalRecipe, settings: EvalSettings) -> list[str]:
    """Return the tasks that may be left out: those of the recipe, if a folder with questions is given.

    Args:
        recipe: what is measured.
        settings: of the evaluation.
    """
    # Several processes load their tasks for themselves, and must have the same ones.
    if settings.task_data is None or processes.num_processes() > 1:
        return []
    return [task for task in recipe.tasks if task not in settings.tasks]


def recorded_parent(child: EvalModel, progress: Progress) -> str | Path | None:
    """Return the parent that the record of a converted model names, if it can be found.

    Args:
        child: the converted model.
        progress: receives a note that names the parent.
    """
    if (record := read_record(child.source.folder)) is None:
        return None
    parent = recorded_source(record, child.source.folder)
    named = record.get("source")
    name = named.get("model") if isinstance(named, dict) else None
    if parent is not None:
        progress.note(f"Parent: {parent}, from the record of {child.name}.")
    elif name:
        progress.warn(f"The parent {name} was not found, so nothing is compared: give `baseline`.")
    return parent


def _warn_of_fixed_examples(evaluation: Evaluation, settings: EvalSettings, progress: Progress) -> None:
    """Warn if a task sets its own number of examples."""
    counts = {c.task: c.num_fewshot for c in evaluation.comparisons if c.num_fewshot is not None}
    fixed = sorted(task for task, count in counts.items() if count != settings.num_fewshot)
    if settings.num_fewshot is not None and fixed:
        progress.warn(
            f"`num_fewshot` has no effect on {', '.join(fixed)}: these tasks set their own number of examples."
        )
