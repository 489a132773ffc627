"""Recipes with `init`: a tokenizer and a model from nothing, trained and saved."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwise.demo import scratch
from headwise.errors import HeadwiseError
from headwise.measure.loss import nats_per_token
from headwise.progress import SILENT, Progress
from headwise.recipes.outcome import hardware, versions
from headwise.recipes.settings import Recipe
from headwise.text import blocks as data
from headwise.text import packages, packing
from headwise.train.trainer import make_trainer, on_cpu


def pretrain(recipe: Recipe, out: Path, *, command: str = "", progress: Progress = SILENT) -> dict[str, Any]:
    """Train as the recipe says and write the model, its tokenizer, its curve and its provenance to `out`.

    Args:
        recipe: one with `init`.
        out: a folder that does not exist yet; it appears when the run is complete.
        command: what the user typed, for the record.
        progress: hears of tokens and losses.

    Returns:
        The record that is also written to OUT/training.json (empty on all processes but the first).

    Raises:
        HeadwiseError: OUT exists, too little text.
    """
    if out.exists():
        raise HeadwiseError(f"{out} exists already.", "Name another folder, or remove it.")
    training = recipe.train
    if recipe.init is None or training is None:
        raise HeadwiseError("This recipe needs a model to train.", "headwise uptrain MODEL OUT --recipe RECIPE")
    tokens = training.budget()
    progress.stage("learning a tokenizer")
    tokenizer = scratch.new_tokenizer(recipe)
    network = scratch.new_model(recipe, tokenizer)
    progress.stage("reading text")
    blocks, text = data.training_blocks(recipe.data, tokenizer, tokens, training.seed)
    held, count = recipe.data.heldout, recipe.data.heldout_blocks
    heldout = data.blocks_from(held, tokenizer, split="heldout", length=recipe.data.length, count=count)

    work = out.parent / f".{out.name}.training"
    processes = PartialState(cpu=on_cpu())
    if processes.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    processes.wait_for_everyone()
    try:
        collate = packing.collator(network, tokenizer, recipe.data.separate_documents)
        trainer = make_trainer(network, blocks, heldout, recipe, work, progress, collate=collate)
        started = time.time()
        trainer.train()
        seconds = time.time() - started
        if not processes.is_main_process:
            return {}
        save(network, tokenizer, work)
        record = {
            "command": command,
            "recipe": asdict(recipe),
            "text": dict(text),
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
        folder, dtype=torch.float32 if on_cpu() else "auto", trust_remote_code=False
    )
    if not on_cpu():
        network.to(torch.accelerator.current_accelerator())
    return asdict(nats_per_token(network, blocks))
