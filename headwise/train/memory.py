"""Forecast the memory of a training run, per process, from configs and file headers: before anything is loaded.

The bytes that the backward pass needs were counted on the stock classes: what autograd saves of a layer, in bytes
per token, for many widths. Mixed precision keeps the residual stream and the norms in float32, and the operands of
matrix products in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from headwise import environment
from headwise.errors import HeadwiseError
from headwise.format import size
from headwise.train.losses import CHUNK
from headwise.train.settings import Training
from headwise.train.student import ModelFolder

# A process that has imported torch, with its kernels loaded on the device.
RESTING_BYTES = 1 << 30
# Fraction that the allocator holds and cannot use.
FRAGMENTATION = 0.03


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that decide its memory.

    Attributes:
        num_parameters: all of them, tied ones once.
        num_embedding_parameters: those of an input embedding that is not tied to the output projection.
        intermediate: elements of a token in the MLP, in all its experts together.
        queries: elements of a token's queries, all heads together. Its keys count as many: where a mask keeps
            documents apart, keys are expanded to every head.
        outputs: elements of a token's head outputs, all heads together. Its values count as many.
        latent: elements of a token's latent in an MLA layer, else 0.
    """

    num_parameters: int
    num_embedding_parameters: int
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate: int
    queries: int
    outputs: int
    latent: int = 0

    @classmethod
    def of(cls, text: Any, num_parameters: int) -> ModelShape:
        """Return the shape of a stock text config.

        Args:
            text: the config of the language model.
            num_parameters: as the files hold them.
        """
        width, heads = text.hidden_size, text.num_attention_heads
        tied = getattr(text, "tie_word_embeddings", False)
        dense = getattr(text, "first_k_dense_replace", 0) >= text.num_hidden_layers
        experts = None if dense else getattr(text, "num_experts_per_tok", None)
        narrow = getattr(text, "moe_intermediate_size", None)
        intermediate = getattr(text, "intermediate_size", None) or 4 * width
        if experts and narrow:
            intermediate = max(intermediate, experts * narrow)
        elif experts:
            intermediate *= experts
        latent = getattr(text, "kv_lora_rank", None) or 0
        if latent:
            queries = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim)
            outputs = heads * text.v_head_dim
        else:
            head = getattr(text, "head_dim", None) or width // heads
            queries = outputs = heads * head
        return cls(
            num_parameters=num_parameters,
            num_embedding_parameters=0 if tied else text.vocab_size * width,
            hidden_size=width,
            num_hidden_layers=text.num_hidden_layers,
            vocab_size=text.vocab_size,
            intermediate=intermediate,
            queries=queries,
            outputs=outputs,
            latent=latent,
        )

    @classmethod
    def of_folder(cls, folder: ModelFolder) -> ModelShape:
        """Return the shape of a folder's model, from its config and the headers of its files.

        An encoder-decoder counts as a decoder with a layer for each of its attention modules, which is more.
        """
        shape = cls.of(folder.text, folder.checkpoint.num_parameters)
        return replace(shape, num_hidden_layers=len(folder.layouts)) if folder.stock.reads_pairs else shape

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer."""
        ends = self.vocab_size * self.hidden_size + self.num_embedding_parameters
        return (self.num_parameters - ends) // self.num_hidden_layers

    def saved_bytes_per_token(self, bytes_per_element: int) -> int:
        """Return the bytes that a layer saves of one token for the backward pass.

        Args:
            bytes_per_element: of a matrix product's operands: 2 in bfloat16, else 4.
        """
        stream = (26 if bytes_per_element == 2 else 24) * self.hidden_size
        attention = 2 * (self.queries + self.outputs)
        if self.latent:  # heads are split, rotated, expanded and joined again
            attention += 3 * (self.queries + self.latent) // 2 + self.outputs
        return stream + bytes_per_element * (4 * self.intermediate + attention)


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of one process at the peak of a training step.

    Attributes:
        apart: bytes counted twice, because gradients and activations are never held in full at the same time.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int
    overhead: int
    apart: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by what takes them."""
        return {name: nbytes for name, nbytes in asdict(self).items() if name != "apart"}

    @property
    def total(self) -> int:
        """All parts together, at the peak."""
        return sum(self.parts.values()) - self.apart


def forecast_memory(
    student: ModelShape,
    *,
    num_trained: int,
    tokens: int,
    teacher: ModelShape | None = None,
    bf16: bool = True,
    checkpointing: bool = False,
    num_shards: int = 1,
    num_replicas: int = 1,
    accumulates: bool = True,
    window: int | None = None,
    chunk: int = CHUNK,
) -> MemoryForecast:
    """Forecast the peak of one process.

    Args:
        student: the model that is trained.
        num_trained: parameters that get gradients.
        tokens: tokens of one forward pass.
        teacher: the model beside it, if there is one.
        bf16: matrix products and teacher in bfloat16 (float32 otherwise, as on a CPU).
        checkpointing: gradient checkpointing, layer by layer.
        num_shards: processes over which FSDP2 shards parameters, gradients, optimizer and teacher.
        num_replicas: processes that hold whole copies. DDP gathers gradients in buckets as large as the gradients.
        accumulates: whether a step has several forward passes, of which the later ones run beside the gradients.
            In a single pass the backward pass frees activations as it fills the gradients.
        window: layers that the backward pass goes through at once, without the logits; None: the whole model.
        chunk: elements of logits that the loss converts to float32 at once.

    Returns:
        The forecast, in bytes.
    """
    bytes_per_element = 2 if bf16 else 4
    sharded = num_shards > 1
    gathered_layers = 2 * 4 * student.num_layer_parameters if sharded else 0  # one in use, one on its way
    ends = 4 * (student.vocab_size * student.hidden_size + student.num_embedding_parameters) if sharded else 0
    # Matrix products use bfloat16 copies of the weights, saved for the backward pass unless they are made again.
    num_layers = student.num_hidden_layers if window is None else min(window, student.num_hidden_layers)
    num_copied = student.num_layer_parameters * (1 if checkpointing else num_layers)
    num_copied += student.vocab_size * student.hidden_size if window is None else 0
    copies = 2 * num_copied if bf16 else 0
    saved_of_layer = student.saved_bytes_per_token(bytes_per_element) * tokens
    if checkpointing:
        inputs = student.num_hidden_layers * 4 * student.hidden_size * tokens
        activations = inputs + int(1.5 * saved_of_layer)
    else:
        activations = num_layers * saved_of_layer + saved_of_layer // 2
    num_logits = tokens * student.vocab_size if window is None else 0
    # The student's, their gradient, the teacher's; then a chunk in float32 with the intermediates of its loss.
    logits = (3 if teacher else 2) * bytes_per_element * num_logits + 4 * 10 * min(chunk, num_logits)
    resident = 0 if teacher is None else bytes_per_element * teacher.num_parameters // num_shards
    if teacher is not None and sharded:
        resident += 2 * bytes_per_element * teacher.num_layer_parameters
        resident += bytes_per_element * teacher.vocab_size * teacher.hidden_size
    parts = {
        "parameters": 4 * student.num_parameters // num_shards + gathered_layers + ends,
        "gradients": 4 * num_trained // num_shards * (2 if num_replicas > 1 else 1) + (gathered_layers + ends) // 2,
        "optimizer": 8 * num_trained // num_shards,
        "teacher": resident,
        "activations": activations + copies,
        "logits": logits,
    }
    apart = 0
    if not accumulates and num_replicas == 1:  # the buckets of DDP stay
        apart = min(parts["gradients"], parts["activations"] + parts["logits"])
    overhead = RESTING_BYTES + int(FRAGMENTATION * sum(parts.values()))
    return MemoryForecast(**parts, overhead=overhead, apart=apart)


def require_memory(
    forecast: MemoryForecast, free: int, place: str, alternatives: Mapping[str, MemoryForecast]
) -> None:
    """Refuse a run that does not fit into memory.

    Args:
        forecast: of the run.
        free: bytes that are free.
        place: the device, for the message.
        alternatives: changes of the settings, and the forecast with each.

    Raises:
        HeadwiseError: names both sizes, and the first alternative that fits.
    """
    if forecast.total <= free:
        return
    largest = sorted(forecast.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in largest)
    fitting = next(((change, other) for change, other in alternatives.items() if other.total <= free), None)
    raise HeadwiseError(
        f"Training needs about {size(forecast.total)} of memory ({parts}), and {place} has {size(free)} free.",
        f"With {fitting[0]} it needs {size(fitting[1].total)}."
        if fitting
        else "Train on more GPUs with `launch` fsdp2, or train fewer weights: train.parameters=attention.",
    )


def check_memory(student: ModelFolder, teacher: ModelFolder | None, training: Training, length: int) -> None:
    """Refuse a run that the device of this process has too little memory for.

    Args:
        student: the folder that is trained.
        teacher: the folder beside it in memory, if there is one.
        training: the settings.
        length: tokens of a block.

    Raises:
        HeadwiseError: names what the run needs, what is free, and what would fit.
    """
    processes = PartialState()
    free = free_device_memory(processes.device, processes.num_processes)
    if free is None:
        return
    on_cpu = processes.device.type == "cpu"
    bf16 = not on_cpu and training.precision == "bf16"
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")

    def forecast(
        num_processes: int, sharded: bool, checkpointing: bool, micro: int | None = training.micro_batch_tokens
    ) -> MemoryForecast:
        return forecast_run(
            student,
            teacher,
            replace(training, micro_batch_tokens=micro),
            length,
            num_processes=num_processes,
            sharded=sharded,
            bf16=bf16,
            checkpointing=checkpointing,
        )

    alternatives: dict[str, MemoryForecast] = {}
    own = training.batch_tokens // processes.num_processes
    rows = min(own, training.micro_batch_tokens or own) // length
    for part in (n for n in range(rows - 1, 0, -1) if rows % n == 0):
        change = f"`settings` train.micro_batch_tokens={part * length}"
        alternatives[change] = forecast(
            processes.num_processes, sharded, training.gradient_checkpointing, part * length
        )
    if not training.gradient_checkpointing:
        change = "`settings` train.gradient_checkpointing=true"
        alternatives[change] = forecast(processes.num_processes, sharded, True)
    for more in () if on_cpu else (2, 4, 8, 16, 32, 64):
        change = f"`launch` fsdp2, `processes` {more} and `settings` train.gradient_checkpointing=true"
        alternatives[change] = forecast(more, True, True)
    require_memory(
        forecast(processes.num_processes, sharded, training.gradient_checkpointing),
        free,
        "this machine" if on_cpu else str(processes.device),
        alternatives,
    )


def forecast_run(
    student: ModelFolder,
    teacher: ModelFolder | None,
    training: Training,
    length: int,
    *,
    num_processes: int = 1,
    sharded: bool = False,
    bf16: bool = True,
    checkpointing: bool | None = None,
) -> MemoryForecast:
    """Forecast the peak of one process of a run.

    Args:
        student: the folder that is trained.
        teacher: the folder beside it in memory, if there is one.
        training: the settings.
        length: tokens of a block.
        num_processes: of the run.
        sharded: whether FSDP2 shards the models over the processes.
        bf16: whether matrix products are in bfloat16.
        checkpointing: in place of `training.gradient_checkpointing`.

    Returns:
        The forecast, in bytes.
    """
    tokens = training.batch_tokens // num_processes
    at_once = max(length, min(tokens, training.micro_batch_tokens or tokens))
    return forecast_memory(
        ModelShape.of_folder(student),
        num_trained=num_trained_parameters(student, training),
        tokens=at_once,
        accumulates=tokens > at_once,
        teacher=None if teacher is None else ModelShape.of_folder(teacher),
        bf16=bf16,
        checkpointing=training.gradient_checkpointing if checkpointing is None else checkpointing,
        num_shards=num_processes if sharded else 1,
        num_replicas=1 if sharded else num_processes,
    )


def num_trained_parameters(folder: ModelFolder, training: Training) -> int:
    """Return the number of parameters that get gradients.

    Args:
        folder: the folder that is trained.
        training: the settings.
    """
    if training.parameters == "all":
        return ModelShape.of_folder(folder).num_parameters
    width = folder.text.hidden_size
    if training.lora is None:
        return sum(layout.num_parameters(width) for layout in folder.layouts)
    # Two thin matrices for each of four projections, the widest as wide as all heads.
    return sum(
        8 * training.lora.rank * max(width, layout.num_attention_heads * layout.head_dim)
        for layout in folder.layouts
    )


def free_device_memory(device: torch.device, num_processes: int = 1) -> int | None:
    """Return the bytes that a process may still take of its device, or its part of the main memory on a CPU.

    Args:
        device: of the process.
        num_processes: processes that share the main memory.

    Returns:
        The bytes; None for devices that do not report them.
    """
    free = environment.available_memory(device)
    return free // num_processes if free is not None and device.type == "cpu" else free
