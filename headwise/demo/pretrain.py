"""Pretrain a small model from random weights, with a tokenizer of its own: how the embedded model was made.

    python -m headwise.demo.pretrain OUT [--settings FILE] [--set a.b=c ...]

The curve grows in `.OUT.training/curve.csv`; OUT appears when the run is complete.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwise import environment
from headwise.compat import no_progress_bars
from headwise.demo import scratch
from headwise.demo.settings import DEMO_SETTINGS, PretrainSettings, load_settings
from headwise.errors import HeadwiseError
from headwise.io.workdir import publish_folder, write_file_atomically
from headwise.measure.loss import nats_per_token
from headwise.progress import SILENT, Progress
from headwise.recipes.outcome import RECORDED_PACKAGES, hardware
from headwise.text import packages
from headwise.text.blocks import blocks_from, training_blocks
from headwise.text.builtin import HELDOUT
from headwise.text.packing import collator
from headwise.train.settings import Loss
from headwise.train.trainer import Task, make_trainer, on_cpu, resume


def pretrain(
    settings: PretrainSettings, out: Path, *, command: str = "", progress: Progress = SILENT
) -> dict[str, Any]:
    """Train a new model, and write it with its tokenizer, its curve and its record.

    Args:
        settings: the model, the text and the training.
        out: a folder that does not exist yet; it appears when the run is complete.
        command: the command line, for the record.
        progress: gets tokens and losses.

    Returns:
        The record that is also written to OUT/training.json; empty on all processes but the first.

    Raises:
        HeadwiseError: OUT exists, or the text is too short.
    """
    if out.exists():
        raise HeadwiseError(f"{out} exists already.", "Name another folder, or remove it.")
    training, text = settings.train, settings.data
    tokens = training.budget()
    progress.stage("learning a tokenizer")
    tokenizer = scratch.new_tokenizer(settings)
    network = scratch.new_model(settings, tokenizer)
    progress.stage("reading text")
    blocks, text_facts = training_blocks(text, tokenizer, tokens, training.seed)
    heldout = blocks_from(text.heldout, tokenizer, split="heldout", length=text.length, count=text.heldout_blocks)

    work = out.parent / f".{out.name}.training"
    processes = PartialState(cpu=on_cpu())
    if processes.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    processes.wait_for_everyone()
    try:
        trainer = make_trainer(
            network,
            blocks,
            heldout,
            training,
            Task(Loss(cross_entropy=1.0)),
            work,
            progress,
            length=text.length,
            collate=collator(network, text.separate_documents),
        )
        started = time.time()
        resume(trainer, None)
        seconds = time.time() - started
        if not processes.is_main_process:
            return {}
        save(network, tokenizer, work)
        record = {
            "command": command,
            "recipe": asdict(settings),
            "text": dict(text_facts),
            "packages": list(packages.permissive_sources()) if "packages" in text_facts else [],
            "heldout_modules": list(HELDOUT),
            "parameters": network.num_parameters(),
            "steps": trainer.state.global_step,
            "tokens": trainer.state.global_step * training.batch_tokens,
            "seconds": round(seconds, 1),
            "hardware": hardware(),
            "versions": environment.versions(RECORDED_PACKAGES),
            "heldout": measure(work, heldout),
        }
        write_file_atomically(work / "training.json", (json.dumps(record, indent=2) + "\n").encode())
        publish_folder(work, out)
    except BaseException:
        if processes.is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        raise
    progress.finish()
    return record


def save(network: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer, as stock transformers loads them.

    Args:
        network: the model.
        tokenizer: its tokenizer.
        folder: where they go.
    """
    network.config.use_cache = True  # the Trainer turned it off
    network.to(torch.bfloat16).save_pretrained(folder)
    scratch.save_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def measure(folder: Path, blocks: Tensor) -> dict[str, Any]:
    """Return the nats per token of the model as it was saved.

    Args:
        folder: the model.
        blocks: held-out text, (blocks, length).
    """
    with no_progress_bars():
        network: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if on_cpu() else "auto", trust_remote_code=False
        )
    if not on_cpu():
        network.to(torch.accelerator.current_accelerator())
    return asdict(nats_per_token(network, blocks))


def run_pretraining(arguments: Sequence[str] | None = None) -> None:
    """Pretrain from the command line.

    Args:
        arguments: in place of those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m headwise.demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--settings", type=Path, default=DEMO_SETTINGS, help="a YAML file [pretrain-demo.yaml]")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="assignments")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(words)
    command = shlex.join(["python", "-m", "headwise.demo.pretrain", *words])
    try:
        pretrain(load_settings(options.settings, options.assignments), options.out, command=command)
    except HeadwiseError as error:
        parser.error(str(error))  # exit code 2


if __name__ == "__main__":
    run_pretraining()
