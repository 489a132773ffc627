"""Callbacks of a training run: the curve on disk, the time budget, the stop at divergence and at a signal."""

from __future__ import annotations

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, integrations

from headwise.errors import HeadwiseError
from headwise.io.fs import os_errors
from headwise.io.workdir import append_to_file, write_file_atomically
from headwise.progress import Progress
from headwise.train.checkpoints import Checkpoints

# Steps that are timed for a time budget: the first half includes compilation, the second gives the pace.
_TIMED_STEPS = 50
# Nats per token: a smaller gap to the parent is noise, and so is a fraction of it.
SMALLEST_GAP = 0.01
# A loss has diverged when it is above twice the lowest loss so far, and by this many nats more.
MARGIN = 1.0


class Diverged(HeadwiseError):
    """Training diverged; the last good checkpoint is kept."""

    keeps_work = True


class CurveCallback(TrainerCallback):
    """Write the training curve: a line of CSV, and of progress, at each report.

    Args:
        path: the CSV. A resumed run continues it after the step that it resumes from.
        batch_tokens: tokens of one step, all processes together.
        progress: gets the figures of every report.
        parent: the parent's nats per token on the held-out text, if there is a parent.
        before: the model's own before training; None: the first held-out loss that is reported.
        seconds: forecast of the whole training; None: there is none.
    """

    COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "heldout", "closed")

    def __init__(
        self,
        path: Path,
        batch_tokens: int,
        progress: Progress,
        parent: float | None = None,
        before: float | None = None,
        seconds: float | None = None,
    ) -> None:
        self.seconds = seconds
        self.path, self.batch_tokens, self.progress = path, batch_tokens, progress
        self.parent, self.before = parent, before
        self.started, self.max_steps = time.time(), 0
        self.reported_tokens, self.resumed_tokens = 0, 0
        # Seconds outside the training: measurements and checkpoints between two steps.
        self.paused, self._step_ended, self._interrupted = 0.0, 0.0, False
        self.closed: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the CSV, or cut it to the step that the run resumes from."""
        rows: list[list[Any]] = _rows_until(self.path, state.global_step) if state.global_step else []
        self.resumed_tokens = self.reported_tokens = state.global_step * self.batch_tokens
        self.started = time.time() - (float(rows[-1][2]) if rows else 0.0)
        self._resumed_at = self._step_ended = time.time()
        if not rows and self.before is not None and math.isfinite(self.before):
            self.closed = gap_closed(self.before, self.parent, self.before)
            rows = [[0, 0, "0.0", "", "", self.before, "" if self.closed is None else f"{self.closed:.4f}"]]
        if state.is_world_process_zero:
            self._write([self.COLUMNS, *rows], write_file_atomically)
        self._show(state.max_steps)
        if self.seconds is not None:
            self.progress.expect(self.seconds)

    def _show(self, max_steps: int) -> None:
        """Begin the stage of the training with the tokens that are left."""
        self.max_steps = max_steps
        self.progress.stage("training", max_steps * self.batch_tokens - self.reported_tokens, "tokens")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the time of a measurement or a checkpoint out of the rate."""
        if self._interrupted:
            self.paused += time.time() - self._step_ended
        self._interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure after the last step, however seldom the recipe measures."""
        control.should_evaluate |= state.global_step >= state.max_steps
        self._interrupted = control.should_evaluate or control.should_save
        if self._interrupted and torch.cuda.is_available():
            torch.cuda.synchronize()  # steps are queued, and count as training
        self._step_ended = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line for a report that has a training loss or a held-out loss."""
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        tokens, now = state.global_step * self.batch_tokens, time.time()
        if "eval_loss" in logs:
            self.before = logs["eval_loss"] if self.before is None else self.before
            self.closed = gap_closed(logs["eval_loss"], self.parent, self.before)
        closed = "" if self.closed is None or "eval_loss" not in logs else f"{self.closed:.4f}"
        figures = [logs.get(key, "") for key in ("loss", "learning_rate", "eval_loss")]
        self._write([[state.global_step, tokens, f"{now - self.started:.1f}", *figures, closed]], append_to_file)
        if self.max_steps != state.max_steps:  # a time budget has shortened the run
            self._show(state.max_steps)
        shown = {name: logs[key] for key, name in (("loss", "loss"), ("eval_loss", "heldout")) if key in logs}
        if self.closed is not None and "eval_loss" in logs:
            shown["gap closed"] = f"{self.closed:.1%}"
        if tokens > self.resumed_tokens:
            seconds = self._step_ended - self._resumed_at - self.paused
            shown["tokens/s"] = f"{(tokens - self.resumed_tokens) / max(seconds, 1e-9):,.0f}"
        self.progress.advance(tokens - self.reported_tokens, **shown)
        self.reported_tokens = tokens

    def _write(self, rows: Sequence[Sequence[Any]], write: Callable[[Path, bytes], None]) -> None:
        lines = io.StringIO(newline="")
        csv.writer(lines, lineterminator="\n").writerows(rows)
        with os_errors(self.path):
            write(self.path, lines.getvalue().encode())


def gap_closed(nats: float, parent: float | None, before: float | None) -> float | None:
    """Return how much of the loss gap to the parent is closed: 0 before training, 1 at the parent.

    Args:
        nats: the loss now, in nats per token.
        parent: the parent's loss.
        before: the loss before training.

    Returns:
        The fraction; None without a parent, and where the gap is smaller than 0.01 nats: a fraction of noise.
    """
    if parent is None or before is None or before - parent < SMALLEST_GAP:
        return None
    return (before - nats) / (before - parent)


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """Return the rows of a curve up to a step; later steps are trained again."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]


def check_reporters(names: Sequence[str]) -> list[str]:
    """Return the names for the `report_to` of transformers' Trainer.

    Args:
        names: integrations, such as tensorboard.

    Raises:
        HeadwiseError: the Trainer has no such integration, or its package is not installed.
    """
    available: Any = integrations
    installed: list[str] = available.get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise HeadwiseError(
                f"Training cannot report to {name!r} here: it is not installed, or Trainer does not know it.",
                f"Installed are: {', '.join(installed) or 'none'}. For example: pip install tensorboard",
            )
    return list(names)


class TimeBudget(TrainerCallback):
    """Shorten a run, once its pace is known, to what fits into a number of seconds.

    Args:
        seconds: wall-clock time of the run.
        progress: gets a note when the run is shortened.
    """

    def __init__(self, seconds: float, progress: Progress) -> None:
        self.seconds, self.progress = seconds, progress
        self.started = self.warm = time.time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.started = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the number of steps once the timed steps are done."""
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


class DivergenceGuard(TrainerCallback):
    """Stop training when the loss is NaN or diverges, before a checkpoint of it is written.

    Args:
        checkpoints: of the run, to name the last good one.
    """

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        self._checkpoints, self._lowest = checkpoints, math.inf

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report before every checkpoint: the Trainer logs before it saves."""
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Check the reported loss and gradient norm.

        Raises:
            Diverged: one is not finite, or the loss has risen too far.
        """
        loss = logs.get("loss")
        if loss is None:
            return
        broken = next((name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))), None)
        if broken is None and loss <= 2 * self._lowest + MARGIN:
            self._lowest = min(self._lowest, loss)
            return
        reason = f"its {broken.replace('_', ' ')} is {logs[broken]}" if broken else f"its loss rose to {loss:.3g}"
        last = self._checkpoints.last if self._checkpoints else None
        good = f"The last good checkpoint is {last}." if last else "There is no checkpoint from before."
        raise Diverged(
            f"Training diverged at step {state.global_step}: {reason}. {good}",
            "Its folder `model` can be used or uptrained further. " * bool(last)
            + "Lower train.learning_rate, and begin again with `force`.",
        )


class SignalStop(TrainerCallback):
    """Stop after the current step at SIGTERM or SIGINT, with a checkpoint. A second signal interrupts at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop all processes at the same step."""
        if args.world_size > 1:
            stopped = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(stopped, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(stopped)
        if self.stopped:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the signals back."""
        self.restore()

    def restore(self) -> None:
        """Give the signals back to their handlers from before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
