"""The one training loop: transformers' Trainer, driven by a recipe.

    python -m headwise.recipes.train RECIPE OUT [--model MODEL] [--set a.b=c ...]

`accelerate launch -m headwise.recipes.train ...` runs the same on several processes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from headwise.errors import HeadwiseError
from headwise.eval.perplexity import nats_per_token
from headwise.recipes import data, packages, schema, scratch
from headwise.recipes.schema import Recipe, Training

_TIMED_STEPS = 50  # enough to see the pace once compilation is over


def run(recipe: Recipe, out: Path, model: str | Path | None = None, command: str = "") -> dict[str, Any]:
    """Train as the recipe says and write the model, its tokenizer, its curve and its provenance to `out`.

    Args:
        recipe: a checked recipe.
        out: a folder that does not exist yet; it appears when the run is complete.
        model: the model to train; needed by recipes without `init`, refused by those with it.
        command: what the user typed, for the record.

    Returns:
        The record that is also written to OUT/headwise.json.

    Raises:
        HeadwiseError: OUT exists, model and recipe do not fit, too little text.
    """
    if out.exists():
        raise HeadwiseError(f"{out} exists already.", "Name another folder, or remove it.")
    if (model is None) == (recipe.init is None):
        raise HeadwiseError(
            "This recipe starts from nothing and takes no model." if model else "This recipe needs a model to train.",
            "Leave --model away." if model else "Give --model FOLDER.",
        )
    work = out.parent / f".{out.name}.training"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    started = time.time()
    tokenizer, network = _start(recipe, model)
    blocks, text = data.training_blocks(recipe.data, tokenizer, recipe.train.seed)
    heldout = data.builtin_blocks(tokenizer, "heldout", recipe.data.length, recipe.data.heldout_blocks)
    _say(f"text: {json.dumps(text)}; {len(blocks)} blocks in one pass; {time.time() - started:.0f} s")

    trainer = make_trainer(network, blocks, heldout, recipe, work)
    _say(f"parameters: {sum(weight.numel() for weight in network.parameters()):,}; steps: {trainer.args.max_steps}")
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    if not trainer.is_world_process_zero():
        return {}

    save(network, tokenizer, work)
    record = {
        "command": command,
        "recipe": asdict(recipe),
        "text": text,
        "packages": list(packages.permissive_sources()) if "packages" in recipe.data.text else [],
        "heldout_modules": list(data.HELDOUT),
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * recipe.train.batch_tokens,
        "seconds": round(seconds, 1),
        "hardware": hardware(),
        "versions": versions(),
        "heldout": measure(work, recipe),
    }
    (work / "headwise.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    work.rename(out)
    return record


class Trainer(transformers.Trainer):
    """Stock Trainer with blocks of tokens as data, our schedule, and the one evaluation path."""

    def __init__(self, *arguments: Any, training: Training, heldout: Tensor, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.training = training
        self.heldout = heldout

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule reads `state.max_steps` anew at each step, so a budget may still shorten the run."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate(step / max(self.state.max_steps, 1), self.training),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Nats per token on the held-out blocks, logged as eval_loss."""
        metrics = {"eval_loss": nats_per_token(self.model, self.heldout, batch_size=16).nats}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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


def make_trainer(network: Any, blocks: Tensor, heldout: Tensor, recipe: Recipe, work: Path) -> Trainer:
    """A Trainer over `blocks` (blocks, length); its curve goes to work/curve.csv as it runs."""
    training, length = recipe.train, blocks.shape[1]
    arguments = _arguments(training, length, work)
    callbacks: list[TrainerCallback] = [Curve(work / "curve.csv", training.batch_tokens)]
    if training.seconds is not None:
        callbacks.append(TimeBudget(training.seconds))
    network.config.use_cache = False
    trainer = Trainer(
        model=network,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=heldout,
        data_collator=_collate,
        callbacks=callbacks,
        training=training,
        heldout=heldout,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _arguments(training: Training, length: int, work: Path) -> TrainingArguments:
    on_cpu = not torch.accelerator.is_available()
    processes = TrainingArguments(output_dir=str(work), report_to=[], use_cpu=on_cpu).world_size
    share = training.batch_tokens // (length * processes)
    micro = min(share, (training.micro_batch_tokens or training.batch_tokens) // length)
    if micro < 1 or share % micro or share * length * processes != training.batch_tokens:
        raise HeadwiseError(
            f"train.batch_tokens {training.batch_tokens} does not divide into {processes} process(es) times whole "
            f"micro-batches of {micro} blocks of {length} tokens.",
            f"Make it a multiple of {length * processes * max(micro, 1)}.",
        )
    every = training.evaluate_every
    return TrainingArguments(
        output_dir=str(work),
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        max_steps=math.ceil(training.tokens / training.batch_tokens),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=training.precision == "bf16",
        torch_compile=training.compile,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="no",
        dataloader_drop_last=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=training.seed,
    )


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    blocks = torch.stack(rows).long()
    return {"input_ids": blocks, "labels": blocks}


class Curve(TrainerCallback):
    """The training curve, a line of CSV at each report."""

    def __init__(self, path: Path, batch_tokens: int) -> None:
        self.path, self.batch_tokens = path, batch_tokens
        self.started = time.time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.time()
        if state.is_world_process_zero:
            self._write(("step", "tokens", "seconds", "loss", "learning_rate", "heldout"), "w")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        tokens, seconds = state.global_step * self.batch_tokens, time.time() - self.started
        figures = [logs.get(key, "") for key in ("loss", "learning_rate", "eval_loss")]
        self._write([state.global_step, tokens, f"{seconds:.1f}", *figures], "a")
        shown = ", ".join(f"{key} {value:.4g}" for key, value in logs.items() if isinstance(value, float))
        pace = f"{tokens / seconds / 1e6:.2f}M tokens/s"
        _say(f"step {state.global_step}/{state.max_steps}, {tokens / 1e6:.1f}M tokens, {pace}: {shown}")

    def _write(self, row: Any, mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


class TimeBudget(TrainerCallback):
    """Shortens a run, once its pace is known, to what fits into the seconds given."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = self.warm = time.time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in (_TIMED_STEPS // 2, _TIMED_STEPS):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps are queued: without it the clock would run ahead of the work
        now = time.time()
        if state.global_step < _TIMED_STEPS:
            self.warm = now
            return
        pace = (_TIMED_STEPS - _TIMED_STEPS // 2) / (now - self.warm)
        steps = torch.tensor([_TIMED_STEPS + max(0.0, self.seconds - (now - self.started)) * pace])
        if args.world_size > 1:
            from accelerate.utils import broadcast

            steps = broadcast(steps.to(args.device))
        state.max_steps = max(state.global_step + 1, min(state.max_steps, int(steps.item())))
        if state.is_world_process_zero:
            _say(f"{pace:.2f} steps/s: {state.max_steps} steps fit into {self.seconds:.0f} s")


def save(network: Any, tokenizer: Any, folder: Path) -> None:
    """The model in bfloat16 and its tokenizer, as stock transformers loads them."""
    network.config.use_cache = True
    network.to(torch.bfloat16).save_pretrained(folder)
    scratch.save_tokenizer(tokenizer, folder)


def measure(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Nats per token of the model as it was saved, on all held-out modules and on the builtin prose."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if torch.cuda.is_available():
        network.to("cuda")
    length, count = recipe.data.length, recipe.data.heldout_blocks
    return asdict(nats_per_token(network, data.builtin_blocks(tokenizer, "heldout", length, count)))


def hardware() -> str:
    """What the run ran on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("headwise", "torch", "transformers", "accelerate", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _start(recipe: Recipe, model: str | Path | None) -> tuple[Any, Any]:
    if recipe.init is not None:
        tokenizer = scratch.new_tokenizer(recipe)
        return tokenizer, scratch.new_model(recipe, tokenizer)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe from the command line."""
    parser = argparse.ArgumentParser(description="Train as a recipe says.")
    parser.add_argument("recipe", help="a name in the library, or a YAML file")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--model", help="the model to train, where the recipe does not make one")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="settings")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "headwise.recipes.train", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        record = run(schema.load(options.recipe, options.settings), options.out, options.model, command)
    except HeadwiseError as error:
        _say(f"error: {error}")
        return error.exit_code
    if record:
        print(json.dumps({key: record[key] for key in ("parameters", "tokens", "seconds", "hardware", "heldout")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
