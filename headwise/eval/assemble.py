"""From what was measured to what was found: compared, corrected, judged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from headwise.eval import compare as comparisons
from headwise.eval.compare import Judged
from headwise.eval.metrics import generation
from headwise.eval.metrics.model_metrics import Alone
from headwise.eval.pair import Run
from headwise.eval.result import Acceptance, Cell, Diagnostics, Evaluation, Gate, Positions
from headwise.eval.tasks import passkey
from headwise.eval.tasks.samples import Results


def assemble(
    run: Run,
    child: Alone,
    parent: Alone | None,
    diagnostics: Diagnostics | None,
    acceptance: Acceptance | None,
    tokenizer: Any,
    fail_above: float | None,
) -> Evaluation:
    """Compare and judge what was measured."""
    start = time.perf_counter()
    judged: list[Judged] = []
    if child.nats:
        nats, other = torch.tensor(child.nats), None if parent is None else torch.tensor(parent.nats)
        judged.append(comparisons.compare_perplexity("heldout", nats, other, child.tokens))
    if child.results is not None:
        judged += comparisons.compare_tasks(child.results, parent.results if parent else None)
    judged = comparisons.correct(judged)
    gates: list[Gate] = []
    if fail_above is not None:
        gates += comparisons.damage_gates(judged, fail_above)
    written = None
    if child.written is not None and run.material.prompts is not None:
        theirs = None if parent is None or parent.written is None else list(map(list, parent.written))
        written = generation.judge(
            run.material.prompts, list(map(list, child.written)), theirs, run.material.new_tokens, tokenizer
        )
        fine = f"No sign of loops or broken texts{', nor of another beginning than the parent' * bool(parent)}."
        detail = " ".join(written.complaints) or fine
        gates.append(Gate("generation", not written.complaints, detail))
    fresh = "parent: tasks" in run.seconds
    run.seconds["comparison"] = time.perf_counter() - start
    return Evaluation(
        child=run.child.subject,
        parent=None if run.baseline is None else run.baseline.subject,
        recipe=None,
        command="",
        settings={},
        comparisons=tuple(one.comparison for one in judged),
        seconds=run.seconds,
        lm_eval_seconds=child.lm_eval_seconds + (parent.lm_eval_seconds if fresh and parent else 0),
        versions={},
        positions=_positions(run, child, parent),
        diagnostics=diagnostics,
        generation=written,
        acceptance=acceptance,
        passkey=tuple(_passkey(child.results, parent.results if parent else None)),
        fail_above=fail_above,
        gates=tuple(gates),
        logs={
            role: run.folder(role).relative_to(run.work).as_posix()
            for role in ("child", *(["parent"] if parent else []))
            if run.harness is not None
        },
    )


def _positions(run: Run, child: Alone, parent: Alone | None) -> Positions | None:
    if child.curve is None:
        return None
    other = run.baseline.context if run.baseline else None
    return Positions(child.curve, parent.curve if parent else None, run.child.context, other)


def _passkey(child: Results | None, parent: Results | None) -> Iterator[Cell]:
    grids = [
        passkey.grid(results.samples["headwise_passkey"])
        if results and "headwise_passkey" in results.samples
        else {}
        for results in (child, parent)
    ]
    for (length, depth), share in grids[0].items():
        yield Cell(length, depth, share, grids[1].get((length, depth)))
