"""Run the parent as a teacher: beside the student in the same process, or from its top-k tokens on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset

from headwise.io.fs import check_space, os_errors
from headwise.io.workdir import publish_folder, write_file_atomically
from headwise.progress import SILENT, Progress
from headwise.train.losses import ModelOutputs
from headwise.train.student import ModelFolder

# Blocks in one forward pass of the teacher while its top-k tokens are cached.
BLOCKS_PER_PASS = 8
# The arrays of the cache, a file each, in the order that `losses.topk_kl` takes them.
TOPK_ARRAYS = {"ids": np.int32, "log_probabilities": np.float16}


def forward_with_hooks(
    network: Any, inputs: dict[str, Tensor], *, hidden_states: bool = False, attention: Sequence[nn.Module] = ()
) -> ModelOutputs:
    """Run a model and capture activations of its layers.

    Args:
        network: the model, or a library's wrapper around it.
        inputs: keyword arguments of the model, (batch, tokens) each.
        hidden_states: capture the output of every layer but the last; of an encoder-decoder, those of its decoder.
        attention: attention modules whose outputs are captured.
    """
    captured: dict[int, Tensor] = {}

    def hook_for(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            captured.setdefault(index, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as hooks:
        for index, module in enumerate(attention):
            hooks.callback(module.register_forward_hook(hook_for(index)).remove)
        outputs = network(**inputs, use_cache=False, output_hidden_states=hidden_states)
    # The first is the embedding; the last is after the final norm.
    name = "hidden_states" if "hidden_states" in outputs else "decoder_hidden_states"
    layers = outputs[name][1:-1] if hidden_states else ()
    # Text does not run the attention of a vision tower, nor that to an image.
    return ModelOutputs(outputs.logits, layers, [captured[index] for index in sorted(captured)])


class Teacher:
    """The parent in the student's process: frozen, in bfloat16, or in float32 on a CPU.

    Args:
        folder: the parent.
        device: of the process.
        compile: compile the model, as the student is.
    """

    def __init__(self, folder: ModelFolder, device: torch.device, compile: bool = False) -> None:
        self.folder, self._compile = folder, compile
        self.network = folder.load(torch.float32 if device.type == "cpu" else torch.bfloat16)
        self.network.eval().requires_grad_(False)
        self.device = device

    def prepare(self, accelerator: Accelerator) -> None:
        """Move the teacher to the student's device: sharded with FSDP2, whole on every device otherwise.

        Args:
            accelerator: the Trainer's.
        """
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and getattr(plugin, "fsdp_version", 1) == 2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            policy = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
            self.network = fsdp2_prepare_model(accelerator, self.network)
            # Otherwise the plugin would look for the teacher's layer class in the student.
            plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy
        else:
            self.network.to(self.device)
        if self._compile:
            self.network.compile()

    @torch.no_grad()
    def __call__(
        self, inputs: dict[str, Tensor], *, hidden_states: bool = False, attention_outputs: bool = False
    ) -> ModelOutputs:
        """Return the teacher's outputs on a batch.

        Args:
            inputs: keyword arguments of the model, (batch, tokens) each.
            hidden_states: also the output of every layer but the last.
            attention_outputs: also the output of every attention module.
        """
        paths = self.folder.attention_paths.values() if attention_outputs else ()
        modules = [self.network.get_submodule(path) for path in paths]
        return forward_with_hooks(self.network, inputs, hidden_states=hidden_states, attention=modules)


class TeacherTopK(Dataset[dict[str, Tensor]]):
    """Blocks with the teacher's top-k tokens at every position, from memory-mapped files.

    Each item is {"block": (length,), "ids": (length, k), "log_probabilities": (length, k)}.

    Args:
        blocks: (blocks, length).
        folder: as `cache_teacher_topk` writes it.
    """

    def __init__(self, blocks: Tensor, folder: Path) -> None:
        self.blocks = blocks
        self.ids, self.log_probabilities = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in TOPK_ARRAYS)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "block": self.blocks[index],
            "ids": torch.from_numpy(self.ids[index].astype(np.int64)),
            "log_probabilities": torch.from_numpy(self.log_probabilities[index].astype(np.float32)),
        }


def cache_teacher_topk(
    folder: ModelFolder,
    blocks: Tensor,
    collate: Callable[[Sequence[Tensor]], dict[str, Tensor]],
    *,
    topk: int,
    temperature: float,
    cache_dir: Path,
    progress: Progress = SILENT,
) -> TeacherTopK:
    """Write the teacher's top-k tokens on all blocks to disk, once; every process writes its part.

    Args:
        folder: the teacher.
        blocks: (blocks, length).
        collate: from blocks to the keyword arguments of the model.
        topk: number of tokens for each position.
        temperature: of the log-probabilities.
        cache_dir: parent of the cache folder, whose name is a hash of all that its content depends on. An existing
            cache is used.
        progress: gets the tokens that are done.

    Returns:
        The blocks with the cached tokens.

    Raises:
        HeadwiseError: they do not fit on the disk.
    """
    processes = PartialState()
    key = [folder.checkpoint.fingerprint(), tuple(blocks.shape), topk, temperature]
    digest = hashlib.sha256(json.dumps(key).encode())
    digest.update(np.ascontiguousarray(blocks.numpy()).data)
    complete = cache_dir / f"teacher-{digest.hexdigest()[:16]}"
    if not complete.exists():
        unfinished = complete.with_suffix(".unfinished")
        shape = (*blocks.shape, topk)
        with os_errors(unfinished):
            if processes.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
                element_bytes = sum(np.dtype(dtype).itemsize for dtype in TOPK_ARRAYS.values())
                check_space(cache_dir, element_bytes * int(np.prod(shape)))
                unfinished.mkdir(parents=True)
                for name, dtype in TOPK_ARRAYS.items():
                    write_file_atomically(unfinished / f"{name}.npy", partial(_make_array, dtype, shape))
            processes.wait_for_everyone()
            _write_topk(folder, blocks, collate, topk, temperature, unfinished, progress)
            processes.wait_for_everyone()
            if processes.is_main_process:
                publish_folder(unfinished, complete)
        processes.wait_for_everyone()
    return TeacherTopK(blocks, complete)


def _make_array(dtype: Any, shape: tuple[int, ...], path: Path) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()


@torch.no_grad()
def _write_topk(
    folder: ModelFolder,
    blocks: Tensor,
    collate: Callable[[Sequence[Tensor]], dict[str, Tensor]],
    topk: int,
    temperature: float,
    to: Path,
    progress: Progress,
) -> None:
    processes = PartialState()
    teacher = Teacher(folder, processes.device)
    teacher.network.to(processes.device)
    ids, log_probabilities = (np.load(to / f"{name}.npy", mmap_mode="r+") for name in TOPK_ARRAYS)
    indices = torch.arange(processes.process_index, len(blocks), processes.num_processes)
    progress.stage("Caching the teacher's top-k tokens", total=blocks.numel(), unit="tokens")
    for chunk in torch.split(indices, BLOCKS_PER_PASS):
        batch = collate([blocks[index] for index in chunk])
        logits = teacher({k: v.to(processes.device) for k, v in batch.items() if k != "labels"}).logits
        for index, row in zip(chunk.tolist(), logits, strict=True):
            best = (row.float() / temperature).log_softmax(-1).topk(topk)
            ids[index], log_probabilities[index] = best.indices.cpu().numpy(), best.values.half().cpu().numpy()
        progress.advance(len(chunk) * blocks.shape[1] * processes.num_processes)
    ids.flush()
    log_probabilities.flush()
