"""Assemble the measurements of an evaluation: compare, correct, gate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from headwise.eval.compare import (
    GatedComparison,
    compare_perplexity,
    compare_tasks,
    correct,
    cut_for_one,
    damage_gates,
    name_unfit_task,
    name_unfit_text,
)
from headwise.eval.metrics.generation import assess_generation
from headwise.eval.metrics.model_metrics import ModelMetrics
from headwise.eval.pair import EvalPair
from headwise.eval.result import (
    FINITE,
    DraftAcceptance,
    Evaluation,
    Gate,
    GenerationComparison,
    PasskeyCell,
    PositionComparison,
)
from headwise.eval.tasks.passkey import passkey_shares
from headwise.eval.tasks.samples import TaskResults
from headwise.measure.divergence import Divergence


def assemble(
    pair: EvalPair,
    child: ModelMetrics,
    parent: ModelMetrics | None,
    divergence: Divergence | None,
    acceptance: DraftAcceptance | None,
    tokenizer: Any,
) -> Evaluation:
    """Compare the measurements of child and parent and gate them.

    Args:
        pair: the pair that was measured.
        child: figures of the child.
        parent: figures of the parent; None without a baseline.
        divergence: None if it was not measured.
        acceptance: None if it was not measured.
        tokenizer: decodes the continuations.

    Returns:
        The evaluation without `recipe`, `command`, `settings` and `versions`.
    """
    start = time.perf_counter()
    compared: list[GatedComparison] = []
    if child.nats:
        parent_nats = None if parent is None else torch.tensor(parent.nats)
        text = "targets" if pair.inputs.pairs is not None else "images" if pair.inputs.images else "heldout"
        heldout = compare_perplexity(text, torch.tensor(child.nats), parent_nats, torch.tensor(child.tokens))
        compared.append(name_unfit_text(heldout, pair.child.vocabulary))
    cut: dict[str, frozenset[str]] = {}
    if child.results is not None:
        cut = cut_for_one(child.results, parent.results if parent else None)
        samples = child.results.samples
        compared += [
            name_unfit_task(gated, samples.get(gated.comparison.task, ()))
            for gated in compare_tasks(child.results, parent.results if parent else None, cut)
        ]
    compared = correct(compared)
    fail_above = pair.settings.fail_above
    gates = [] if fail_above is None else list(damage_gates(compared, fail_above))
    generation = _assess_generation(pair, child, parent, tokenizer)
    if generation is not None:
        gates.append(_generation_gate(generation))
    roles = {"child": child.results, "parent": parent.results if parent else None}
    gates += _finite_gates(roles)
    parent_measured = "parent: tasks" in pair.seconds
    pair.seconds["comparison"] = time.perf_counter() - start
    return Evaluation(
        child=pair.child.subject,
        parent=None if pair.baseline is None else pair.baseline.subject,
        recipe=None,
        command="",
        settings={},
        comparisons=tuple(gated.comparison for gated in compared),
        seconds=pair.seconds,
        lm_eval_seconds=child.lm_eval_seconds + (parent.lm_eval_seconds if parent_measured and parent else 0),
        versions={},
        positions=_compare_positions(pair, child, parent),
        diagnostics=divergence,
        generation=generation,
        acceptance=acceptance,
        passkey=tuple(_passkey_cells(child.results, parent.results if parent else None)),
        fail_above=fail_above,
        gates=tuple(gates),
        notes=(*_tasks_not_run(pair), *_cut_prompts(roles, cut)),
        logs={
            role: pair.folder(role).relative_to(pair.work).as_posix()
            for role in ("child", *(["parent"] if parent else []))
            if pair.harness is not None
        },
    )


def _assess_generation(
    pair: EvalPair, child: ModelMetrics, parent: ModelMetrics | None, tokenizer: Any
) -> GenerationComparison | None:
    if child.written is None or pair.inputs.prompts is None:
        return None
    parent_written = None if parent is None or parent.written is None else list(map(list, parent.written))
    return assess_generation(
        pair.inputs.prompts, list(map(list, child.written)), parent_written, pair.inputs.new_tokens, tokenizer
    )


def _generation_gate(generation: GenerationComparison) -> Gate:
    no_complaints = "No repetition and no early ends beyond the bounds."
    if generation.parent is not None:
        no_complaints = "No more repetition and early ends than the parent, and the first tokens agree."
    return Gate("generation", not generation.complaints, " ".join(generation.complaints) or no_complaints)


def _finite_gates(roles: Mapping[str, TaskResults | None]) -> Iterator[Gate]:
    """Yield a failed gate for each task with answers that are not finite; lm-eval counts them as answers."""
    for role, results in roles.items():
        for task, counts in (results.answers if results else {}).items():
            if counts.not_finite:
                share = f"{counts.not_finite:,} of {counts.questions:,} answers"
                yield Gate(FINITE, False, f"{share} of the {role} to {task} are NaN or infinite.")


def _tasks_not_run(pair: EvalPair) -> Iterator[str]:
    """Yield a sentence that names the tasks of the recipe without reachable questions."""
    if pair.harness is not None and pair.harness.not_run:
        names = ", ".join(pair.harness.not_run)
        yield f"Not run, because the folder has no questions and the Hub cannot be reached: {names}."


def _cut_prompts(roles: Mapping[str, TaskResults | None], cut: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """Yield a sentence for each task whose prompts exceed a model's context."""
    for role, results in roles.items():
        for task, counts in (results.answers if results else {}).items():
            if counts.cut:
                share = f"{len(counts.cut):,} of {counts.questions:,} prompts"
                yield f"{share} of {task} exceed the context of the {role} and were truncated from the left."
    for task, left_out in cut.items():
        if left_out:
            yield f"{len(left_out):,} questions of {task} are not compared: one model alone reads them whole."


def _compare_positions(
    pair: EvalPair, child: ModelMetrics, parent: ModelMetrics | None
) -> PositionComparison | None:
    if child.curve is None:
        return None
    parent_context = pair.baseline.context if pair.baseline else None
    return PositionComparison(child.curve, parent.curve if parent else None, pair.child.context, parent_context)


def _passkey_cells(child: TaskResults | None, parent: TaskResults | None) -> Iterator[PasskeyCell]:
    grids = [
        passkey_shares(results.samples["headwise_passkey"])
        if results and "headwise_passkey" in results.samples
        else {}
        for results in (child, parent)
    ]
    for (length, depth), share in grids[0].items():
        yield PasskeyCell(length, depth, share, grids[1].get((length, depth)))
