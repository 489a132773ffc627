"""The parent as a teacher: beside the student in the same process, or its most likely tokens on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset

from headwise.io.fs import check_space, plain_errors, sync
from headwise.progress import SILENT, Progress
from headwise.train.student import ModelFolder

# Blocks a teacher reads at once while its answers are written down.
BLOCKS_AT_ONCE = 8
# The files of a teacher's answers.
ANSWERS = {"ids": np.int32, "log_probabilities": np.float16}


@dataclass(frozen=True)
class Said:
    """What a model says to a batch: logits (batch, tokens, vocabulary); of every layer, where asked for, its output
    and its attention's output, (batch, tokens, D) each."""

    logits: Tensor
    hidden_states: Sequence[Tensor] = ()
    attention_outputs: Sequence[Tensor] = ()


def ask(
    network: Any, inputs: dict[str, Tensor], *, hidden_states: bool = False, attention: Sequence[nn.Module] = ()
) -> Said:
    """Run a model, and listen to its layers.

    Args:
        network: the model, or what a library wrapped it in.
        attention: its attention modules whose outputs are wanted.
    """
    heard: dict[int, Tensor] = {}

    def listen(place: int) -> Callable[..., None]:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            heard.setdefault(place, output[0] if isinstance(output, tuple) else output)

        return keep

    with ExitStack() as hooks:
        for place, module in enumerate(attention):
            hooks.callback(module.register_forward_hook(listen(place)).remove)
        said = network(**inputs, use_cache=False, output_hidden_states=hidden_states)
    # The first is the embedding, the last has been through the final norm.
    layers = said.hidden_states[1:-1] if hidden_states else ()
    return Said(said.logits, layers, [heard[place] for place in range(len(attention))])


class Teacher:
    """The parent in the student's process: frozen, in bfloat16 (float32 on a CPU), compiled if the student is."""

    def __init__(self, folder: ModelFolder, device: torch.device, compile: bool = False) -> None:
        self.folder, self._compile = folder, compile
        self.network = folder.load(torch.float32 if device.type == "cpu" else torch.bfloat16)
        self.network.eval().requires_grad_(False)
        self.device = device

    def prepare(self, accelerator: Accelerator) -> None:
        """Put it where the student is: sharded with FSDP2, whole on every device otherwise."""
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and getattr(plugin, "fsdp_version", 1) == 2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            chosen = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
            self.network = fsdp2_prepare_model(accelerator, self.network)
            # Otherwise the plugin would look for the teacher's layer class in the student.
            plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = chosen
        else:
            self.network.to(self.device)
        if self._compile:
            self.network.compile()

    @torch.no_grad()
    def __call__(
        self, inputs: dict[str, Tensor], *, hidden_states: bool = False, attention_outputs: bool = False
    ) -> Said:
        modules = [self.network.get_submodule(p) for p in self.folder.attention] if attention_outputs else []
        return ask(self.network, inputs, hidden_states=hidden_states, attention=modules)


class Answers(Dataset[dict[str, Tensor]]):
    """Blocks with a teacher's most likely tokens at every position, from memory-mapped files.

    Each item is {"block": (length,), "ids": (length, k), "log_probabilities": (length, k)}.
    """

    def __init__(self, blocks: Tensor, folder: Path) -> None:
        self.blocks = blocks
        self.ids, self.log_probabilities = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ANSWERS)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {
            "block": self.blocks[place],
            "ids": torch.from_numpy(self.ids[place].astype(np.int64)),
            "log_probabilities": torch.from_numpy(self.log_probabilities[place].astype(np.float32)),
        }


def answers(
    folder: ModelFolder,
    blocks: Tensor,
    inputs: Callable[[Sequence[Tensor]], dict[str, Tensor]],
    *,
    topk: int,
    temperature: float,
    home: Path,
    progress: Progress = SILENT,
) -> Answers:
    """The teacher's answers to all blocks, written once; every process writes its share.

    Args:
        inputs: from blocks to what a model is called with.
        home: where the folder of the answers goes, named after all that they depend on; one that is there already
            is used.

    Raises:
        HeadwiseError: they do not fit on the disk.
    """
    processes = PartialState()
    facts = [folder.checkpoint.fingerprint(), tuple(blocks.shape), topk, temperature]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(np.ascontiguousarray(blocks.numpy()).data)
    ready = home / f"teacher-{digest.hexdigest()[:16]}"
    if not ready.exists():
        work = ready.with_suffix(".unfinished")
        shape = (*blocks.shape, topk)
        with plain_errors(work):
            if processes.is_main_process:
                shutil.rmtree(work, ignore_errors=True)
                check_space(home, sum(np.dtype(kind).itemsize for kind in ANSWERS.values()) * int(np.prod(shape)))
                work.mkdir(parents=True)
                for name, kind in ANSWERS.items():
                    np.lib.format.open_memmap(work / f"{name}.npy", mode="w+", dtype=kind, shape=shape).flush()
            processes.wait_for_everyone()
            _write_answers(folder, blocks, inputs, topk, temperature, work, progress)
            processes.wait_for_everyone()
            if processes.is_main_process:
                for name in ANSWERS:
                    sync(work / f"{name}.npy")
                work.rename(ready)
        processes.wait_for_everyone()
    return Answers(blocks, ready)


@torch.no_grad()
def _write_answers(
    folder: ModelFolder,
    blocks: Tensor,
    inputs: Callable[[Sequence[Tensor]], dict[str, Tensor]],
    topk: int,
    temperature: float,
    work: Path,
    progress: Progress,
) -> None:
    processes = PartialState()
    teacher = Teacher(folder, processes.device)
    teacher.network.to(processes.device)
    ids, log_probabilities = (np.load(work / f"{name}.npy", mmap_mode="r+") for name in ANSWERS)
    mine = torch.arange(processes.process_index, len(blocks), processes.num_processes)
    progress.stage("Teacher's answers", total=blocks.numel(), unit="tokens")
    for places in mine.split(BLOCKS_AT_ONCE):
        rows = inputs([blocks[place] for place in places])
        logits = teacher({k: v.to(processes.device) for k, v in rows.items() if k != "labels"}).logits
        for place, row in zip(places.tolist(), logits, strict=True):
            best = (row.float() / temperature).log_softmax(-1).topk(topk)
            ids[place], log_probabilities[place] = best.indices.cpu().numpy(), best.values.half().cpu().numpy()
        progress.advance(len(places) * blocks.shape[1] * processes.num_processes)
    ids.flush()
    log_probabilities.flush()
