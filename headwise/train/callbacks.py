"""What listens to a training run: the curve on disk, and the clock."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from headwise.errors import HeadwiseError
from headwise.io.fs import plain_errors
from headwise.progress import Progress

_TIMED_STEPS = 50  # the first half goes to compilation and warm caches, the second shows the pace


class Curve(TrainerCallback):
    """The training curve: a line of CSV, and of progress, at each report.

    Args:
        path: the CSV. A resumed run goes on in it after the step it resumes from.
        batch_tokens: tokens of one step, all processes together.
        parent: the parent's nats per token on the held-out text, if there is a parent.
        before: the model's own before training; None: the first held-out loss that is heard.
    """

    COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "heldout", "closed")

    def __init__(
        self,
        path: Path,
        batch_tokens: int,
        progress: Progress,
        parent: float | None = None,
        before: float | None = None,
    ) -> None:
        self.path, self.batch_tokens, self.progress = path, batch_tokens, progress
        self.parent, self.before = parent, before
        self.started, self.total, self.reported, self.resumed = time.time(), 0, 0, 0
        self.closed: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept: list[list[Any]] = _rows_until(self.path, state.global_step) if state.global_step else []
        self.resumed = self.reported = state.global_step * self.batch_tokens
        self.started = time.time() - (float(kept[-1][2]) if kept else 0.0)
        self._resumed_at = time.time()
        if not kept and self.before is not None and math.isfinite(self.before):
            self.closed = gap_closed(self.before, self.parent, self.before)
            kept = [[0, 0, "0.0", "", "", self.before, "" if self.closed is None else f"{self.closed:.4f}"]]
        if state.is_world_process_zero:
            self._write([self.COLUMNS, *kept], "w")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A curve has its end, however seldom the recipe measures.
        control.should_evaluate |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        tokens, now = state.global_step * self.batch_tokens, time.time()
        if "eval_loss" in logs:
            self.before = logs["eval_loss"] if self.before is None else self.before
            self.closed = gap_closed(logs["eval_loss"], self.parent, self.before)
        closed = "" if self.closed is None or "eval_loss" not in logs else f"{self.closed:.4f}"
        figures = [logs.get(key, "") for key in ("loss", "learning_rate", "eval_loss")]
        self._write([[state.global_step, tokens, f"{now - self.started:.1f}", *figures, closed]], "a")
        if self.total != state.max_steps:  # the beginning, or a budget has shortened the run
            self.total = state.max_steps
            self.progress.stage("training", self.total * self.batch_tokens - self.reported, "tokens")
        shown = {name: logs[key] for key, name in (("loss", "loss"), ("eval_loss", "heldout")) if key in logs}
        if self.closed is not None:
            shown["gap closed"] = f"{self.closed:.1%}"
        if tokens > self.resumed:
            shown["tokens/s"] = f"{(tokens - self.resumed) / (now - self._resumed_at):,.0f}"
        self.progress.advance(tokens - self.reported, **shown)
        self.reported = tokens

    def _write(self, rows: Any, mode: str) -> None:
        with plain_errors(self.path), self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def gap_closed(now: float, parent: float | None, before: float | None) -> float | None:
    """The share of the distance to the parent that is gone: 1 at the parent, more below it.

    None where there is no parent, or was no distance.
    """
    if parent is None or before is None or before <= parent:
        return None
    return (before - now) / (before - parent)


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """What a curve holds up to a step; what was reported after it is done again."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]


def check_reporters(names: list[str]) -> list[str]:
    """The names that Trainer's report_to gets.

    Raises:
        HeadwiseError: Trainer knows none of that name, or its package is not installed.
    """
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise HeadwiseError(
                f"Training cannot report to {name!r} here: it is not installed, or Trainer does not know it.",
                f"Installed are: {', '.join(installed) or 'none'}. For example: pip install tensorboard",
            )
    return names


class TimeBudget(TrainerCallback):
    """Shortens a run, once its pace is known, to what fits into the seconds given."""

    def __init__(self, seconds: float, progress: Progress) -> None:
        self.seconds, self.progress = seconds, progress
        self.started = self.warm = time.time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in (_TIMED_STEPS // 2, _TIMED_STEPS):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps are queued: without it the clock would run ahead of the work
        now = time.time()
        if state.global_step < _TIMED_STEPS:
            self.warm = now
            return
        pace = (_TIMED_STEPS - _TIMED_STEPS // 2) / (now - self.warm)
        steps = _TIMED_STEPS + max(1, int((self.seconds - (now - self.started)) * pace))
        if args.world_size > 1:  # the processes must stop at the same step: the first one's clock decides
            from accelerate.utils import broadcast_object_list

            steps = broadcast_object_list([steps])[0]
        if steps < state.max_steps:
            state.max_steps = steps
            if state.is_world_process_zero:
                self.progress.note(f"{pace:.2f} steps per second: {steps} steps fit into {self.seconds:.0f} s")
