"""The one training loop: transformers' Trainer, driven by a recipe.

    python -m headwise.recipes.train RECIPE OUT [--model MODEL] [--set a.b=c ...]

`accelerate launch -m headwise.recipes.train ...` runs the same on several processes.
"""

from __future__ import annotations

import argparse
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
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from headwise import ui
from headwise.errors import HeadwiseError
from headwise.eval.perplexity import nats_per_token
from headwise.progress import SILENT, Progress
from headwise.recipes import data, packages, schema, scratch
from headwise.recipes.callbacks import Curve, TimeBudget
from headwise.recipes.schema import Recipe, Training


def run(
    recipe: Recipe,
    out: Path,
    model: str | Path | None = None,
    *,
    command: str = "",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train as the recipe says and write the model, its tokenizer, its curve and its provenance to `out`.

    Args:
        recipe: a checked recipe.
        out: a folder that does not exist yet; it appears when the run is complete.
        model: the model to train; needed by recipes without `init`, refused by those with it.
        command: what the user typed, for the record.
        progress: hears of tokens and losses.

    Returns:
        The record that is also written to OUT/training.json (empty on all processes but the first).

    Raises:
        HeadwiseError: OUT exists, model and recipe do not fit, too little text.
    """
    if out.exists():
        raise HeadwiseError(f"{out} exists already.", "Name another folder, or remove it.")
    training = recipe.train
    assert training is not None
    tokens = training.budget()
    tokenizer, network = _start(recipe, model, progress)
    progress.stage("reading text")
    blocks, text = data.training_blocks(recipe.data, tokenizer, tokens, training.seed)
    heldout = data.builtin_blocks(tokenizer, "heldout", recipe.data.length, recipe.data.heldout_blocks)

    work = out.parent / f".{out.name}.training"
    processes = PartialState(cpu=_on_cpu())
    if processes.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    processes.wait_for_everyone()
    try:
        trainer = make_trainer(network, blocks, heldout, recipe, work, progress)
        started = time.time()
        trainer.train()
        seconds = time.time() - started
        if not processes.is_main_process:
            return {}
        save(network, tokenizer, work)
        record = {
            "command": command,
            "recipe": asdict(recipe),
            "text": text,
            "packages": list(packages.permissive_sources()) if "packages" in text else [],
            "heldout_modules": list(data.HELDOUT),
            "parameters": network.num_parameters(),
            "steps": trainer.state.global_step,
            "tokens": trainer.state.global_step * training.batch_tokens,
            "seconds": round(seconds, 1),
            "hardware": hardware(),
            "versions": versions(),
            "heldout": measure(work, heldout),
        }
        (work / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        work.rename(out)
    except BaseException:
        if processes.is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        raise
    progress.finish()
    return record


class Trainer(transformers.Trainer):
    """Stock Trainer with our schedule and the one evaluation path."""

    def __init__(self, *arguments: Any, training: Training, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.training = training

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule reads `state.max_steps` anew at each step, so a budget may still shorten the run."""
        if self.lr_scheduler is None:
            over: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                over,
                lambda step: learning_rate(step / max(self.state.max_steps, 1), self.training),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Nats per token on the held-out blocks, logged as eval_loss."""
        blocks: Any = self.eval_dataset
        metrics = {"eval_loss": nats_per_token(self.model, blocks).nats}
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


def make_trainer(
    network: Any, blocks: Tensor, heldout: Tensor, recipe: Recipe, work: Path, progress: Progress = SILENT
) -> Trainer:
    """A Trainer over `blocks` (blocks, length); its curve goes to work/curve.csv as it runs."""
    training = recipe.train
    assert training is not None
    callbacks: list[Any] = [Curve(work / "curve.csv", training.batch_tokens, progress)]
    if training.seconds is not None:
        callbacks.append(TimeBudget(training.seconds, progress))
    trainer = Trainer(
        model=network,
        args=_arguments(training, blocks.shape[1], work),
        train_dataset=blocks,
        eval_dataset=heldout,
        data_collator=_collate,
        callbacks=callbacks,
        training=training,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _arguments(training: Training, length: int, work: Path) -> TrainingArguments:
    processes = PartialState(cpu=_on_cpu()).num_processes
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
        use_cpu=_on_cpu(),
        max_steps=math.ceil(training.budget() / training.batch_tokens),
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
        logging_nan_inf_filter=False,  # it waits for the device at each step
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="no",
        dataloader_drop_last=True,
        dataloader_pin_memory=not _on_cpu(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        seed=training.seed,
    )


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    blocks = torch.stack(rows).long()
    return {"input_ids": blocks, "labels": blocks}


def save(network: Any, tokenizer: Any, folder: Path) -> None:
    """The model in bfloat16 and its tokenizer, as stock transformers loads them."""
    network.config.use_cache = True  # the Trainer turned it off
    network.to(torch.bfloat16).save_pretrained(folder)
    scratch.save_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def measure(folder: Path, blocks: Tensor) -> dict[str, Any]:
    """Nats per token of the model as it was saved."""
    network: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32 if _on_cpu() else "auto", trust_remote_code=False
    )
    if not _on_cpu():
        network.to(torch.accelerator.current_accelerator())
    return asdict(nats_per_token(network, blocks))


def hardware() -> str:
    """What the run ran on."""
    if torch.cuda.is_available():
        return f"{PartialState().num_processes} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("headwise", "torch", "transformers", "accelerate", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            continue
    return found


def _start(recipe: Recipe, model: str | Path | None, progress: Progress) -> tuple[Any, Any]:
    if recipe.init is not None:
        if model is not None:
            raise HeadwiseError("This recipe starts from nothing and takes no model.", "Leave --model away.")
        progress.stage("learning a tokenizer")
        tokenizer = scratch.new_tokenizer(recipe)
        return tokenizer, scratch.new_model(recipe, tokenizer)
    if model is None:
        raise HeadwiseError("This recipe needs a model to train.", "Give --model FOLDER.")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(model, trust_remote_code=False), network


def _on_cpu() -> bool:
    return not torch.accelerator.is_available()


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe from the command line."""
    parser = argparse.ArgumentParser(description="Train as a recipe says.")
    parser.add_argument("recipe", help="a name in the library, or a YAML file")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--model", help="the model to train, where the recipe does not make one")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="settings")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    ui.configure()
    transformers.utils.logging.disable_progress_bar()
    try:
        recipe = schema.load(options.recipe, options.settings)
        command = shlex.join(["python", "-m", "headwise.recipes.train", *given])
        with ui.progress() as progress:
            record = run(recipe, options.out, options.model, command=command, progress=progress)
    except HeadwiseError as error:
        ui.error(error.message, error.hint)
        return error.exit_code
    if record:
        nats = record["heldout"]["nats"]
        ui.say(f"{options.out}: {record['tokens']:,} tokens, {nats:.4f} nats per token on the held-out modules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
