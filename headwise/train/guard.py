"""What ends a training run early: a loss that is lost, and a signal."""

from __future__ import annotations

import math
import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback

from headwise.errors import HeadwiseError
from headwise.train.checkpoints import Checkpoints

# A loss has diverged when it is above twice the lowest there was, and by this many nats more.
MARGIN = 1.0


class Diverged(HeadwiseError):
    """Training went wrong; the last good checkpoint stays."""

    keeps_work = True


class Guard(TrainerCallback):
    """Stops a run whose loss is no number any more or has left the ground, before that becomes a checkpoint."""

    def __init__(self, checkpoints: Checkpoints | None) -> None:
        self._checkpoints, self._lowest = checkpoints, math.inf

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The Trainer reports before it saves, so nothing is saved that was not looked at.
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = logs.get("loss")
        if loss is None:
            return
        broken = next((name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))), None)
        if broken is None and loss <= 2 * self._lowest + MARGIN:
            self._lowest = min(self._lowest, loss)
            return
        what = f"its {broken.replace('_', ' ')} is {logs[broken]}" if broken else f"its loss rose to {loss:.3g}"
        last = self._checkpoints.last if self._checkpoints else None
        good = f"The last good checkpoint is {last}." if last else "There is no checkpoint from before."
        raise Diverged(
            f"Training diverged at step {state.global_step}: {what}. {good}",
            "Its folder `model` can be used or uptrained further" * bool(last)
            + ("; a" if last else "A")
            + " lower train.learning_rate with --force begins again.",
        )


class Stopper(TrainerCallback):
    """At SIGTERM or SIGINT the run ends after its step, with a checkpoint. A second signal ends it at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:  # all processes stop at the same step
            heard = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(heard)
        if self.stopped:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
