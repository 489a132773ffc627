"""Write the checkpoints of a training run: each is complete or absent, and the last few are kept.

A checkpoint holds the Trainer's state (optimizer, schedule, random states), the trained weights in full precision,
and in `model` the stock model of the folder at that step.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from headwise.errors import HeadwiseError
from headwise.io.fs import DiskError, check_space, os_errors
from headwise.io.workdir import discard_folder, publish_folder, write_file_atomically

WEIGHTS = "trained.safetensors"
# Bytes of a trained parameter in a checkpoint: its value and AdamW's two averages, in float32.
BYTES_PER_PARAMETER = 12


class Checkpoints:
    """The `checkpoint-STEP` folders of a run.

    Args:
        folder: where they are; `writing` inside is the one that grows.
        trained: names of the trained parameters to the number of their elements.
        num_kept: number of checkpoints that are kept.
        export: writes the stock model of a state dict into a new folder.
        nbytes: size of what `export` writes.
    """

    def __init__(
        self,
        folder: Path,
        trained: Mapping[str, int],
        *,
        num_kept: int = 2,
        export: Callable[[Mapping[str, Tensor], Path], None] | None = None,
        nbytes: int = 0,
    ) -> None:
        self.folder, self.staging, self.num_kept = folder, folder / "writing", max(1, num_kept)
        self._trained, self._export, self._nbytes = trained, export, nbytes

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        folders = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.all()), None)

    def load(self, network: Any, checkpoint: Path) -> None:
        """Load the weights of a checkpoint into a network that is not wrapped yet."""
        load_tensors(network, checkpoint / WEIGHTS)

    def write_weights(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the trained weights and the stock model of a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(state, self._trained, folder / WEIGHTS)
        if self._export:
            self._export(state, folder / "model")

    @contextmanager
    def writing(self, args: Any) -> Iterator[None]:
        """Make a checkpoint of what is written into `staging` meanwhile, then remove the oldest ones.

        Args:
            args: the Trainer's arguments.

        Raises:
            DiskError: there is no room for it; existing checkpoints stay.
        """
        processes = PartialState()
        if args.should_save:
            with os_errors(self.folder):
                shutil.rmtree(self.staging, ignore_errors=True)
                self.check_space()
                self.staging.mkdir(parents=True)
        processes.wait_for_everyone()
        with os_errors(self.folder):
            yield
        processes.wait_for_everyone()
        if args.should_save:
            with os_errors(self.folder):
                self._publish()
        processes.wait_for_everyone()

    def _publish(self) -> None:
        for written in self.staging.glob("checkpoint-*"):
            publish_folder(written, self.folder / written.name)
        for old in self.all()[: -self.num_kept]:
            discard_folder(old, self.staging / "old")

    def check_space(self) -> None:
        """Raise DiskError unless one more checkpoint fits on the disk."""
        try:
            check_space(self.folder, BYTES_PER_PARAMETER * sum(self._trained.values()) + self._nbytes)
        except HeadwiseError as error:
            raise DiskError(f"No checkpoint can be written: {error.message}", error.hint) from None


def save_tensors(state: Mapping[str, Tensor], names: Iterable[str], path: Path) -> None:
    """Write some tensors of a state dict to a file that appears when it is complete.

    Args:
        state: a state dict.
        names: the tensors to write.
        path: the safetensors file.
    """
    tensors = {name: state[name].contiguous() for name in names}
    write_file_atomically(path, lambda unfinished: save_file(tensors, unfinished))


def load_tensors(network: Any, path: Path) -> None:
    """Load the tensors of a file into a network.

    Args:
        network: the module; parameters that are not in the file stay as they are.
        path: a safetensors file.
    """
    network.load_state_dict(load_file(path), strict=False)


def load_optimizer(network: Any, optimizer: Any, checkpoint: Path, *, sharded: bool) -> bool:
    """Load the optimizer's averages of a checkpoint that another kind of training wrote.

    FSDP2 writes a folder of shards by parameter name. Every other training writes a file by parameter index.

    Args:
        network: the network, sharded or whole.
        optimizer: over parameters of `network`.
        checkpoint: the folder.
        sharded: whether `network` is sharded.

    Returns:
        Whether the checkpoint was of the other kind; False: nothing was loaded.
    """
    shards, file = checkpoint / "optimizer_0", checkpoint / "optimizer.pt"
    if sharded == shards.is_dir() or not (shards.is_dir() or file.is_file()):
        return False
    if shards.is_dir():
        state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(network, optimizer)}
        with warnings.catch_warnings():  # that one process reads the shards of several is intended
            warnings.simplefilter("ignore", UserWarning)
            load_shards(state, checkpoint_id=shards)
        set_optimizer_state_dict(network, optimizer, state["optimizer"])
        return True
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    whole = torch.load(file, map_location="cpu", weights_only=True)
    state = {
        "state": {order[index]: averages for index, averages in whole["state"].items()},
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]} for group in whole["param_groups"]
        ],
    }
    set_optimizer_state_dict(network, optimizer, state, options=StateDictOptions(full_state_dict=True))
    return True
