"""What listens to a training run: the curve on disk, and the clock."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from headwise.progress import Progress

_TIMED_STEPS = 50  # the first half goes to compilation and warm caches, the second shows the pace


class Curve(TrainerCallback):
    """The training curve: a line of CSV, and of progress, at each report."""

    COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "heldout")

    def __init__(self, path: Path, batch_tokens: int, progress: Progress) -> None:
        self.path, self.batch_tokens, self.progress = path, batch_tokens, progress
        self.started, self.total, self.reported = time.time(), 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.time()
        if state.is_world_process_zero:
            self._write(self.COLUMNS, "w")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        tokens = state.global_step * self.batch_tokens
        figures = [logs.get(key, "") for key in ("loss", "learning_rate", "eval_loss")]
        self._write([state.global_step, tokens, f"{time.time() - self.started:.1f}", *figures], "a")
        if self.total != state.max_steps:  # the beginning, or a budget has shortened the run
            self.total = state.max_steps
            self.progress.stage("training", self.total * self.batch_tokens - self.reported, "tokens")
        shown = {name: logs[key] for key, name in (("loss", "loss"), ("eval_loss", "heldout")) if key in logs}
        self.progress.advance(tokens - self.reported, **shown)
        self.reported = tokens

    def _write(self, row: Any, mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


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
