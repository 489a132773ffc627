"""Train a network: transformers' Trainer with the losses, schedule, checkpoints and measurement of headwise."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from headwise.errors import SettingError
from headwise.io.workdir import write_file_atomically
from headwise.measure.loss import nats_per_token
from headwise.progress import SILENT, Progress
from headwise.text.pairs import Pairs
from headwise.train.callbacks import CurveCallback, DivergenceGuard, SignalStop, TimeBudget
from headwise.train.checkpoints import Checkpoints, load_optimizer
from headwise.train.losses import total_loss
from headwise.train.settings import Loss, Training
from headwise.train.teacher import TOPK_ARRAYS, Teacher, forward_with_hooks

# Number of checkpoints of a run whose recipe does not set `save_every`, and the fewest steps between two of them.
DEFAULT_NUM_CHECKPOINTS, FEWEST_STEPS = 10, 50
STREAM_STATE = "stream.json"
# The file of the schedule, as transformers names it.
SCHEDULE = "scheduler.pt"
# The argument by which a class learns which tokens hold an image. In training some classes insist on it.
TOKEN_KINDS = "mm_token_type_ids"


@dataclass(frozen=True)
class Task:
    """The loss of a training, and what it compares with.

    Attributes:
        loss: the weights of its terms.
        teacher: the parent beside the network, where the loss needs it and its top-k tokens are not on disk.
        scales: of the network's residual stream and attention outputs over the teacher's.
        attention: the paths of the network's attention modules.
    """

    loss: Loss
    teacher: Teacher | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    attention: Sequence[str] = ()


class Trainer(transformers.Trainer):
    """Train with the loss of a `Task` and write `Checkpoints`.

    Args:
        arguments: of transformers' Trainer.
        training: the settings.
        task: the loss.
        checkpoints: where they go; None: no checkpoints.
        options: of transformers' Trainer.
    """

    def __init__(
        self,
        *arguments: Any,
        training: Training,
        task: Task,
        checkpoints: Checkpoints | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.training, self.task, self.checkpoints = training, task, checkpoints
        # The Trainer then counts the predicted tokens of a whole step; `compute_loss` weighs a micro-batch by them.
        self.model_accepts_loss_kwargs = True
        self._bf16 = training.precision == "bf16" and not self.args.use_cpu
        if task.teacher is not None:
            task.teacher.prepare(self.accelerator)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the task's loss on a micro-batch; those of a step add up to the mean over its predicted tokens.

        Args:
            model: the network, wrapped.
            inputs: the batch: keyword arguments of the model, `labels`, and the teacher's top-k tokens.
            return_outputs: not used.
            num_items_in_batch: predicted tokens of the whole step, all processes together; None: those of `inputs`.
        """
        labels = inputs.pop("labels")
        topk = [inputs.pop(name) for name in TOPK_ARRAYS if name in inputs]
        loss, teacher = self.task.loss, self.task.teacher
        hidden_states = bool(loss.hidden_states)
        network: Any = self.model
        stock = network.get_base_model() if hasattr(network, "get_base_model") else network
        if TOKEN_KINDS in inspect.signature(stock.forward).parameters:
            inputs[TOKEN_KINDS] = torch.zeros_like(inputs["input_ids"])
        attention = []
        if loss.attention_outputs:
            attention = [network.get_submodule(path) for path in self.task.attention]
        expected = None
        if teacher is not None:
            expected = teacher(inputs, hidden_states=hidden_states, attention_outputs=bool(attention))
        # Not the Trainer's own bf16: it would convert all logits to float32 at once.
        # No cache: it would hold a bfloat16 copy of every weight, even with gradient checkpointing.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
            actual = forward_with_hooks(model, inputs, hidden_states=hidden_states, attention=attention)
        mean = total_loss(
            loss.weights,
            actual,
            labels,
            expected,
            topk,
            self.task.scales,
            temperature=loss.temperature,
            compiled=self.training.compile,
        )
        if num_items_in_batch is None:
            return mean
        processes = self.args.world_size if self.args.average_tokens_across_devices else 1
        weighted: Tensor = mean * processes * (labels[..., 1:] != -100).sum() / num_items_in_batch
        return weighted

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule. It reads `state.max_steps` at each step, because a time budget may shorten the run.

        Args:
            num_training_steps: not used.
            optimizer: to schedule; None: the Trainer's.
        """
        if self.lr_scheduler is None:
            scheduled: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                scheduled,
                lambda step: learning_rate((step + 0.5) / max(self.state.max_steps, 1), self.training),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Measure nats per token on the held-out blocks, and log them as eval_loss."""
        metrics = {"eval_loss": self.measure(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, network: Any) -> float:
        """Return a network's nats per token on the held-out blocks."""
        blocks: Any = self.eval_dataset
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16):
            return nats_per_token(network, blocks).nats

    def state_dict(self) -> dict[str, Tensor]:
        """Return the network's tensors, gathered to the CPU of the first process; other processes get none."""
        if (self.is_fsdp_enabled and self.model_wrapped is not self.model) or _is_sharded(self.model):
            state = self.accelerator.get_state_dict(self.model)
        else:
            state = self.accelerator.unwrap_model(self.model).state_dict()
        return {name: tensor.detach().cpu() for name, tensor in state.items()} if self.args.should_save else {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint: the trained ones in full precision, and the stock model."""
        assert self.checkpoints is not None and output_dir is not None
        state = self.state_dict()
        if self.args.should_save:
            self.checkpoints.write_weights(Path(output_dir), state)
            if isinstance(stream := self.train_dataset, IterableDataset):
                position = stream.state_dict(self.state.global_step * self._rows_per_step)  # type: ignore[attr-defined]
                write_file_atomically(Path(output_dir, STREAM_STATE), json.dumps(position).encode())

    @property
    def _rows_per_step(self) -> int:
        """Rows of one optimizer step, all processes together."""
        args = self.args
        rows: int = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return rows

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.checkpoints is not None
        with self.checkpoints.writing(self.args):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.staging if self.checkpoints is not None else self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the weights are loaded before the network is wrapped, which suits every kind of sharding."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP, write the optimizer's shards without another copy of the weights."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            state = schedule.state_dict()
            write_file_atomically(Path(output_dir, SCHEDULE), lambda path: torch.save(state, path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer, also from a checkpoint of another kind of sharding."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        if checkpoint is not None and load_optimizer(
            self.model, optimizer, Path(checkpoint), sharded=self.is_fsdp_enabled
        ):
            schedule: Any = self.lr_scheduler
            schedule.load_state_dict(torch.load(Path(checkpoint, SCHEDULE), weights_only=True))
            return
        super()._load_optimizer_and_scheduler(checkpoint)


def learning_rate(progress: float, training: Training) -> float:
    """Return the learning rate at a point of the run, as a fraction of the peak.

    Args:
        progress: fraction of the run that is done.
        training: the settings.
    """
    progress = min(progress, 1.0)
    if progress < training.warmup:
        return progress / training.warmup
    if training.schedule == "cosine":
        after_warmup = (1 - training.warmup) or 1.0
        height = 0.5 + 0.5 * math.cos(math.pi * (progress - training.warmup) / after_warmup)
    else:
        height = min(1.0, (1 - progress) / 0.2)
    return training.final_learning_rate + (1 - training.final_learning_rate) * height


def make_trainer(
    network: Any,
    blocks: Any,
    heldout: Tensor | Pairs,
    training: Training,
    task: Task,
    work: Path,
    progress: Progress = SILENT,
    *,
    length: int,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    checkpoints: Checkpoints | None = None,
    tokens: int | None = None,
    figures: Mapping[str, float | None] | None = None,
    trainer_class: type[Trainer] = Trainer,
    device: str | None = None,
) -> Trainer:
    """Make a Trainer over blocks of text; its curve goes to work/curve.csv as it runs.

    Args:
        network: the model.
        blocks: (blocks, length): a tensor, a `TeacherTopK`, or a stream of rows; pairs for an encoder-decoder.
        heldout: blocks that measure progress, int64 (blocks, length), or pairs.
        training: the settings, with a learning rate.
        task: the loss.
        work: folder of the curve.
        progress: gets the figures of every report.
        length: tokens of a block.
        collate: from rows to a batch.
        checkpoints: where they go; None: no checkpoints.
        tokens: of the run, where the settings alone do not give them.
        figures: `parent` and `before`, nats on the held-out text, and the forecast in `seconds`, for the curve.
        trainer_class: what to make; a subclass has another loss.
        device: "cpu" trains on the CPU of a machine with an accelerator; None: on the accelerator if there is one.

    Returns:
        The Trainer; `resume` starts it.

    Raises:
        SettingError: `batch_tokens` does not divide into the processes, or the text does not fill one step.
    """
    tokens = tokens or training.budget()
    arguments = _arguments(training, length, work, tokens, checkpoints is not None, device)
    rows = training.batch_tokens // length
    if not isinstance(blocks, IterableDataset) and len(blocks) < rows:
        # The Trainer drops a batch that is not full: it would take no step, without an error.
        raise SettingError(
            "train.batch_tokens",
            f"The recipe's text fills {len(blocks)} rows of {length} tokens, and a step takes {rows}.",
            f"Give more text, or train.batch_tokens={len(blocks) * length}.",
        )
    callbacks: list[Any] = [
        CurveCallback(work / "curve.csv", training.batch_tokens, progress, **(figures or {})),
        DivergenceGuard(checkpoints),
    ]
    if training.seconds is not None:
        callbacks.append(TimeBudget(training.seconds, progress))
    if checkpoints is not None:
        callbacks.append(SignalStop())
    trainer = trainer_class(
        model=network,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=heldout,
        data_collator=collate,
        callbacks=callbacks,
        training=training,
        task=task,
        checkpoints=checkpoints,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def collate_topk(collate: Callable[[list[Tensor]], dict[str, Tensor]]) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Return a collator of the items of a `TeacherTopK`.

    Args:
        collate: from blocks to a batch.
    """

    def collate_items(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collate([item["block"] for item in items])
        for name in TOPK_ARRAYS:
            stacked = torch.stack([item[name] for item in items])
            batch[name] = stacked.reshape(*batch["input_ids"].shape, -1)
        return batch

    return collate_items


def resume(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint on if there is one.

    Args:
        trainer: with the checkpoint's weights in its network.
        checkpoint: the folder, or None.

    Raises:
        KeyboardInterrupt: a signal stopped the run before its last step; its checkpoint is written.
    """
    if checkpoint is not None and (checkpoint / STREAM_STATE).exists():
        position = json.loads((checkpoint / STREAM_STATE).read_text())
        trainer.train_dataset.load_state_dict(position)  # type: ignore[union-attr]
        trainer.args.ignore_data_skip = True
    stops = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SignalStop)]
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for stop in stops:
            stop.restore()
    if any(stop.stopped for stop in stops) and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt


def _arguments(
    training: Training, length: int, work: Path, tokens: int, checkpoints: bool, device: str | None
) -> TrainingArguments:
    processes, cpu = process_state(device).num_processes, on_cpu(device)
    rows = training.batch_tokens // (length * processes)
    micro_rows = min(rows, (training.micro_batch_tokens or training.batch_tokens) // length)
    if micro_rows < 1 or rows % micro_rows or rows * length * processes != training.batch_tokens:
        raise SettingError(
            "train.batch_tokens",
            f"train.batch_tokens {training.batch_tokens} does not divide into {processes} process(es) times whole "
            f"micro-batches of {micro_rows} blocks of {length} tokens.",
            f"Make it a multiple of {length * processes * max(micro_rows, 1)}.",
        )
    every, steps = training.evaluate_every, math.ceil(tokens / training.batch_tokens)
    default_every = max(FEWEST_STEPS, steps // DEFAULT_NUM_CHECKPOINTS)
    save_every = training.save_every if training.save_every is not None else default_every
    assert training.learning_rate is not None  # whoever knows the model has decided it
    arguments = TrainingArguments(
        output_dir=str(work),
        use_cpu=cpu,
        max_steps=steps,
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=rows // micro_rows,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        torch_compile=training.compile,
        **_checkpointing(training),
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,  # it waits for the device at each step
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="steps" if checkpoints and save_every else "no",
        save_steps=save_every or 1,
        dataloader_drop_last=True,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(training.report_to),
        seed=training.seed,
    )
    # One process trains on one GPU: the Trainer would take all of them, and multiply the batch by their number.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _checkpointing(training: Training) -> dict[str, Any]:
    """Return the arguments for gradient checkpointing; their name differs between releases of transformers."""
    if not training.gradient_checkpointing:
        return {}
    known = TrainingArguments.__dataclass_fields__
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def on_cpu(device: str | None = None) -> bool:
    """Return whether training runs on the CPU.

    Args:
        device: "cpu", or None for an accelerator if there is one.
    """
    return device == "cpu" or not torch.accelerator.is_available()


def process_state(device: str | None = None) -> PartialState:
    """Return accelerate's state of this process, on the device that the training uses.

    Args:
        device: "cpu", or None for an accelerator if there is one.
    """
    cpu = on_cpu(device)
    state = PartialState(cpu=cpu)
    if (state.device.type == "cpu") != cpu:  # accelerate keeps the device of an earlier run in the same process
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=cpu)
    return state


def _is_sharded(network: Any) -> bool:
    return any(hasattr(p, "full_tensor") for p in network.parameters())
