"""Checkpoints of a training run: each is there whole or not at all, and the last few are kept.

A checkpoint holds what the Trainer needs to go on (optimizer, schedule, random states), the trained weights in
full precision, and in `model` the folder's own stock model as it is at that step.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.fs import DiskError, check_space, plain_errors, sync

WEIGHTS = "trained.safetensors"
# Bytes of a trained number in a checkpoint: itself and AdamW's two averages, in float32.
BYTES = 12


class Checkpoints:
    """`checkpoint-STEP` folders in one place.

    Args:
        folder: where they are; `writing` inside is the one that grows.
        trained: names of the trained parameters, and how many numbers they have in all.
        keep: how many stay.
        export: writes the stock model of a state dict into a new folder. `nbytes` is what it takes.
    """

    def __init__(
        self,
        folder: Path,
        trained: Mapping[str, int],
        *,
        keep: int = 2,
        export: Callable[[Mapping[str, Tensor], Path], None] | None = None,
        nbytes: int = 0,
    ) -> None:
        self.folder, self.staging, self.keep = folder, folder / "writing", max(1, keep)
        self._trained, self._export, self._nbytes = trained, export, nbytes

    def all(self) -> list[Path]:
        """The complete ones, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    @property
    def last(self) -> Path | None:
        return next(reversed(self.all()), None)

    def load(self, network: Any, checkpoint: Path) -> None:
        """Give a network, not yet wrapped, a checkpoint's weights."""
        put(network, checkpoint / WEIGHTS)

    def write_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """The weights' part of a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        keep(state, self._trained, folder / WEIGHTS)
        if self._export:
            self._export(state, folder / "model")

    @contextmanager
    def writing(self, args: Any) -> Iterator[None]:
        """What is written into `staging` meanwhile becomes a checkpoint; then the oldest ones go.

        Raises:
            DiskError: there is no room for it; the checkpoints there are stay as they are.
        """
        processes = PartialState()
        if args.should_save:
            with plain_errors(self.folder):
                shutil.rmtree(self.staging, ignore_errors=True)
                self.check_space()
                self.staging.mkdir(parents=True)
        processes.wait_for_everyone()
        with plain_errors(self.folder):
            yield
        processes.wait_for_everyone()
        if args.should_save:
            with plain_errors(self.folder):
                self._publish()
        processes.wait_for_everyone()

    def _publish(self) -> None:
        for written in self.staging.glob("checkpoint-*"):
            for path in written.rglob("*"):
                sync(path)
            sync(written)
            os.rename(written, self.folder / written.name)
        sync(self.folder)
        for old in self.all()[: -self.keep]:
            # By one rename it is no checkpoint any more, however far its deletion gets; `writing` removes the rest.
            with suppress(OSError):
                os.rename(old, self.staging / "old")
            shutil.rmtree(self.staging / "old", ignore_errors=True)

    def check_space(self) -> None:
        """Raise DiskError unless one more checkpoint fits on the disk."""
        try:
            check_space(self.folder, BYTES * sum(self._trained.values()) + self._nbytes)
        except HeadwiseError as error:
            raise DiskError(f"No checkpoint can be written: {error.message}", error.hint) from None


def keep(state: Mapping[str, Tensor], names: Iterable[str], path: Path) -> None:
    """Write some tensors of a state dict, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: state[name].contiguous() for name in names}, unfinished)
    sync(unfinished)
    os.rename(unfinished, path)


def put(network: Any, path: Path) -> None:
    """Give a network the tensors of a file."""
    network.load_state_dict(load_file(path), strict=False)
