"""Whether a run fits into the memory of the device it is to run on, asked before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from headwise.convert import forecast as conversion
from headwise.recipes.settings import Recipe
from headwise.train.memory import Forecast, Shape, forecast, refuse_unless_it_fits
from headwise.train.student import ModelFolder


def check_memory(folder: ModelFolder, teacher: ModelFolder | None, recipe: Recipe) -> None:
    """Refuse a run that the device of this process is too small for.

    Raises:
        HeadwiseError: what it needs, what there is, and what would fit.
    """
    processes = PartialState()
    free = free_memory(processes.device, processes.num_processes)
    if recipe.train is None or free is None:
        return
    count, sharded = processes.num_processes, parse_flag_from_env("ACCELERATE_USE_FSDP")
    half = processes.device.type != "cpu" and recipe.train.precision == "bf16"
    found = of_run(folder, teacher, recipe, processes=count, sharded=sharded, half=half)
    leaner: dict[str, Forecast] = {}
    if not recipe.train.gradient_checkpointing:
        words = "--set train.gradient_checkpointing=true"
        leaner[words] = of_run(
            folder, teacher, recipe, processes=count, sharded=sharded, half=half, checkpointing=True
        )
    if processes.device.type != "cpu":
        for wider in (2, 4, 8, 16, 32, 64):
            words = f"--launch fsdp2 --processes {wider} --set train.gradient_checkpointing=true"
            leaner[words] = of_run(
                folder, teacher, recipe, processes=wider, sharded=True, half=half, checkpointing=True
            )
    where = "this machine" if processes.device.type == "cpu" else str(processes.device)
    refuse_unless_it_fits(found, free, where, leaner)


def of_run(
    folder: ModelFolder,
    teacher: ModelFolder | None,
    recipe: Recipe,
    *,
    processes: int = 1,
    sharded: bool = False,
    half: bool = True,
    checkpointing: bool | None = None,
) -> Forecast:
    """The forecast of a recipe's main stage for one of its processes."""
    training = recipe.train
    assert training is not None
    beside = teacher is not None and recipe.loss.needs_teacher and recipe.teacher.topk is None
    share = training.batch_tokens // processes
    return forecast(
        shape(folder),
        trained=trained_parameters(folder, recipe),
        tokens=max(recipe.data.length, min(share, training.micro_batch_tokens or share)),
        teacher=shape(teacher) if beside and teacher is not None else None,
        half=half,
        checkpointing=training.gradient_checkpointing if checkpointing is None else checkpointing,
        sharded=processes if sharded else 1,
        replicas=1 if sharded else processes,
    )


def shape(folder: ModelFolder) -> Shape:
    """A folder's sizes, from its config and the headers of its files."""
    return Shape.of(folder.text, sum(math.prod(entry.shape) for entry in folder.checkpoint.tensors.values()))


def trained_parameters(folder: ModelFolder, recipe: Recipe) -> int:
    """How many numbers the recipe gives gradients to."""
    training = recipe.train
    assert training is not None
    if training.parameters == "all":
        return shape(folder).parameters
    width = folder.text.hidden_size
    if training.lora is None:
        return sum(conversion.attention_parameters(layout, width) for layout in folder.layouts)
    # Two thin matrices for each of four projections, the widest as wide as all heads.
    return sum(
        8 * training.lora.rank * max(width, layout.num_attention_heads * layout.head_dim)
        for layout in folder.layouts
    )


def free_memory(device: Any, processes: int = 1) -> int | None:
    """Bytes that a process may still take: of its device, or its share of the machine's memory.

    None where that cannot be known.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = conversion.free_memory() if device.type == "cpu" else None
    return None if free is None else free // processes
