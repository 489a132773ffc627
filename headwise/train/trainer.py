"""The one training loop: transformers' Trainer with our losses, schedule, checkpoints and measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from headwise.errors import HeadwiseError
from headwise.measure.loss import nats_per_token
from headwise.progress import SILENT, Progress
from headwise.recipes.settings import Loss, Recipe, Training
from headwise.train.callbacks import Curve, TimeBudget
from headwise.train.checkpoints import Checkpoints
from headwise.train.guard import Guard, Stopper
from headwise.train.objective import total_loss
from headwise.train.teacher import ANSWERS, Teacher, ask

# Checkpoints of a run whose recipe does not say how often, and the fewest steps between two of them.
CHECKPOINTS, FEWEST_STEPS = 10, 50
STREAM = "stream.json"


@dataclass(frozen=True)
class Task:
    """What a network is trained to do.

    Attributes:
        teacher: the parent beside it, where the loss needs one and its answers are not on disk.
        scales: of the network's residual stream and attention outputs over the teacher's.
        attention: the paths of the network's attention modules.
    """

    loss: Loss
    teacher: Teacher | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    attention: Sequence[str] = ()


class Trainer(transformers.Trainer):
    """Stock Trainer that computes a `Task`'s loss and keeps `Checkpoints`."""

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
        # The loss is a mean over the tokens of a micro-batch, so the Trainer has to divide by their number.
        self.model_accepts_loss_kwargs = False
        self._bf16 = training.precision == "bf16" and not on_cpu()
        if task.teacher is not None:
            task.teacher.prepare(self.accelerator)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """The task's loss on a batch, a mean over its predicted tokens."""
        labels = inputs.pop("labels")
        answers: dict[str, Tensor] = {name: inputs.pop(name) for name in ANSWERS if name in inputs}
        loss, teacher = self.task.loss, self.task.teacher
        inside: dict[str, bool] = {"hidden_states": bool(loss.hidden_states)}
        network: Any = self.model
        attention = []
        if loss.attention_outputs:
            attention = [network.get_submodule(path) for path in self.task.attention]
        theirs = teacher(inputs, **inside, attention_outputs=bool(attention)) if teacher else None
        # Not the Trainer's own bf16: it would bring all logits to float32 at once.
        # No cache: it would hold a bfloat16 copy of every weight, where activations are not kept.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
            ours = ask(model, inputs, **inside, attention=attention)
        return total_loss(loss, ours, labels, theirs, answers, self.task.scales, compiled=self.training.compile)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule reads `state.max_steps` anew at each step, so a budget may still shorten the run."""
        if self.lr_scheduler is None:
            over: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                over,
                lambda step: learning_rate((step + 0.5) / max(self.state.max_steps, 1), self.training),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Nats per token on the held-out blocks, logged as eval_loss."""
        metrics = {"eval_loss": self.measure(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, network: Any) -> float:
        """Nats per token of a network on the held-out blocks."""
        blocks: Any = self.eval_dataset
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16):
            return nats_per_token(network, blocks).nats

    def state_dict(self) -> dict[str, Tensor]:
        """The network's tensors on the CPU, gathered where they are sharded (empty on processes but the first)."""
        if (self.is_fsdp_enabled and self.model_wrapped is not self.model) or _is_sharded(self.model):
            state = self.accelerator.get_state_dict(self.model)
        else:
            state = self.accelerator.unwrap_model(self.model).state_dict()
        return {name: tensor.detach().cpu() for name, tensor in state.items()} if self.args.should_save else {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint: what is trained, in full precision, and the folder's own model beside it."""
        assert self.checkpoints is not None and output_dir is not None
        state = self.state_dict()
        if self.args.should_save:
            self.checkpoints.write_weights(Path(output_dir), state)
            if isinstance(stream := self.train_dataset, IterableDataset):
                place = stream.state_dict(self.state.global_step * self._rows)  # type: ignore[attr-defined]
                Path(output_dir, STREAM).write_text(json.dumps(place))

    @property
    def _rows(self) -> int:
        """Rows of one optimizer step, all processes together."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.checkpoints is not None
        with self.checkpoints.writing(self.args):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.staging if self.checkpoints is not None else self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the weights are in the network before it is wrapped, which suits every kind of sharding."""


def learning_rate(progress: float, training: Training) -> float:
    """The learning rate at a share of the run, as a share of the peak."""
    progress = min(progress, 1.0)
    if progress < training.warmup:
        return progress / training.warmup
    if training.schedule == "cosine":
        height = 0.5 + 0.5 * math.cos(math.pi * (progress - training.warmup) / (1 - training.warmup))
    else:
        height = min(1.0, (1 - progress) / 0.2)
    return training.final_learning_rate + (1 - training.final_learning_rate) * height


def make_trainer(
    network: Any,
    blocks: Any,
    heldout: Tensor,
    recipe: Recipe,
    work: Path,
    progress: Progress = SILENT,
    *,
    task: Task | None = None,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    checkpoints: Checkpoints | None = None,
    tokens: int | None = None,
    figures: dict[str, float | None] | None = None,
) -> Trainer:
    """A Trainer over `blocks` (blocks, length); its curve goes to work/curve.csv as it runs.

    Args:
        blocks: a tensor, `Answers`, or a stream of rows.
        collate: from rows to a batch.
        tokens: of the run, where the recipe alone does not say it.
        figures: `parent` and `before`, nats on the held-out text, for the curve.
    """
    training = recipe.train
    assert training is not None
    tokens = tokens or training.budget()
    arguments = _arguments(training, recipe.data.length, work, tokens, checkpoints is not None)
    rows = training.batch_tokens // recipe.data.length
    if not isinstance(blocks, IterableDataset) and len(blocks) < rows:
        # The Trainer leaves out a batch that is not full: it would take no step, and say nothing.
        raise HeadwiseError(
            f"The recipe's text fills {len(blocks)} rows of {recipe.data.length} tokens, and a step takes {rows}.",
            f"Give more text, or --set train.batch_tokens={len(blocks) * recipe.data.length}.",
        )
    callbacks: list[Any] = [
        Curve(work / "curve.csv", training.batch_tokens, progress, **(figures or {})),
        Guard(checkpoints),
    ]
    if training.seconds is not None:
        callbacks.append(TimeBudget(training.seconds, progress))
    if checkpoints is not None:
        callbacks.append(Stopper())
    trainer = Trainer(
        model=network,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=heldout,
        data_collator=collate,
        callbacks=callbacks,
        training=training,
        task=task or Task(recipe.loss),
        checkpoints=checkpoints,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def with_answers(collate: Callable[[list[Tensor]], dict[str, Tensor]]) -> Callable[[list[Any]], dict[str, Tensor]]:
    """A collator of `Answers`' items."""

    def both(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collate([row["block"] for row in rows])
        for name in ANSWERS:
            stacked = torch.stack([row[name] for row in rows])
            batch[name] = stacked.reshape(*batch["input_ids"].shape, -1)
        return batch

    return both


def resume(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint on if there is one."""
    if checkpoint is not None and (checkpoint / STREAM).exists():
        place = json.loads((checkpoint / STREAM).read_text())
        trainer.train_dataset.load_state_dict(place)  # type: ignore[union-attr]
        trainer.args.ignore_data_skip = True
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _arguments(training: Training, length: int, work: Path, tokens: int, checkpoints: bool) -> TrainingArguments:
    processes = PartialState(cpu=on_cpu()).num_processes
    share = training.batch_tokens // (length * processes)
    micro = min(share, (training.micro_batch_tokens or training.batch_tokens) // length)
    if micro < 1 or share % micro or share * length * processes != training.batch_tokens:
        raise HeadwiseError(
            f"train.batch_tokens {training.batch_tokens} does not divide into {processes} process(es) times whole "
            f"micro-batches of {micro} blocks of {length} tokens.",
            f"Make it a multiple of {length * processes * max(micro, 1)}.",
        )
    every, steps = training.evaluate_every, math.ceil(tokens / training.batch_tokens)
    save = training.save_every if training.save_every is not None else max(FEWEST_STEPS, steps // CHECKPOINTS)
    arguments = TrainingArguments(
        output_dir=str(work),
        use_cpu=on_cpu(),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
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
        save_strategy="steps" if checkpoints and save else "no",
        save_steps=save or 1,
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=training.report_to or [],
        seed=training.seed,
    )
    # One process trains on one GPU: the Trainer would take all of them, and multiply the batch by their number.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _checkpointing(training: Training) -> dict[str, Any]:
    """The arguments that turn on gradient checkpointing; releases differ in what they call it."""
    if not training.gradient_checkpointing:
        return {}
    known = TrainingArguments.__dataclass_fields__
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def on_cpu() -> bool:
    """Whether training happens on the CPU."""
    return not torch.accelerator.is_available()


def _is_sharded(network: Any) -> bool:
    return any(hasattr(p, "full_tensor") for p in network.parameters())
