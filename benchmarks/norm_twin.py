"""Compare the MLA damage of a model with norms on queries and keys with that of its twin without them.

    python benchmarks/norm_twin.py OUT                        # one GPU: trains two twins, converts and measures
    python benchmarks/norm_twin.py OUT --seconds 100 --refit 300
    python benchmarks/norm_twin.py OUT --tiny                 # a minute on a CPU; its figures mean nothing

The twins have the shape and the text of the embedded model. One has the layout of Qwen3, the other that of Llama;
both see the same tokens in the same order. The Qwen3 twin is trained for a number of seconds, the other for as many
tokens. Each is converted to MLA at three sizes of the cache, in closed form and after the refit of every layer. The
rows "mean scale" replace the norm by its mean scale, the rows "regression" by the library's linear map.

OUT/qwen3 and OUT/llama keep the twins: a second call reads them. OUT/rows.jsonl has one row for each conversion.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.mla import target
from headwise.convert.mla.stand_in import linear_stand_in
from headwise.convert.pipeline import convert_model
from headwise.demo import pretrain, scratch
from headwise.demo.settings import load_settings
from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.loss import nats_per_token
from headwise.text.blocks import blocks_from, training_blocks
from headwise.text.packing import collator
from headwise.train.settings import Loss
from headwise.train.trainer import Task, make_trainer, on_cpu, resume

TWINS = ("qwen3", "llama")
SHARES = (0.5, 0.25, 0.125)
# Damage with norms over damage without them: the largest ratio in closed form, and after the refit.
LIMITS = {"closed form": 2.0, "refit": 1.3}
# A model, a text and a budget that a CPU trains in a minute.
TINY = (
    "data.text={builtin: 1}",
    "data.length=128",
    "init.config.hidden_size=64",
    "init.config.intermediate_size=96",
    "init.config.num_hidden_layers=2",
    "init.config.num_attention_heads=4",
    "init.config.num_key_value_heads=4",
    "train.batch_tokens=2048",
    "train.compile=false",
    "train.precision=float32",
)


def train_twins(out: Path, assignments: list[str], tokens: int, seconds: float | None) -> None:
    """Train both twins on the same blocks, and write them with the embedded model's tokenizer."""
    settings = load_settings(assignments=assignments)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    started = time.monotonic()
    blocks, facts = training_blocks(settings.data, tokenizer, tokens, settings.train.seed)
    print(f"text: {facts}, {time.monotonic() - started:.0f} s", flush=True)
    length = settings.data.length
    heldout = blocks_from(settings.data.heldout, tokenizer, split="heldout", length=length, count=8)
    for model_type in TWINS:
        head_dim = settings.init.config["hidden_size"] // settings.init.config["num_attention_heads"]
        config = {**settings.init.config, "model_type": model_type, "head_dim": head_dim}
        wanted = replace(settings, init=replace(settings.init, config=config))
        training = replace(settings.train, tokens=tokens, seconds=seconds, evaluate_every=None)
        network = scratch.new_model(wanted, tokenizer)
        with tempfile.TemporaryDirectory() as work:
            collate = collator(network, settings.data.separate_documents)
            trainer = make_trainer(
                network,
                blocks,
                heldout,
                training,
                Task(Loss(cross_entropy=1.0)),
                Path(work),
                length=length,
                collate=collate,
            )
            started = time.monotonic()
            resume(trainer, None)
        steps = trainer.state.global_step
        # The second twin has as many steps as the first, whatever its pace.
        tokens, seconds = steps * training.batch_tokens, None
        pretrain.save(network, tokenizer, out / model_type)
        print(f"{model_type}: {tokens:,} tokens, {steps} steps, {time.monotonic() - started:.0f} s", flush=True)
        torch._dynamo.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=400_000_000, help="of each twin, at most")
    parser.add_argument("--seconds", type=float, default=90, help="of training for the Qwen3 twin")
    parser.add_argument("--refit", type=int, default=300, help="steps per layer; 0: closed form only")
    parser.add_argument("--calibration-tokens", type=int, default=196_608)
    parser.add_argument("--blocks", type=int, help="of held-out text (default: all)")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.seconds, options.refit = 102_400, None, min(options.refit, 3)
        options.calibration_tokens, options.blocks = 2048, 4
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not all((out / twin / "config.json").exists() for twin in TWINS):
        train_twins(out, list(TINY) if options.tiny else [], options.tokens, options.seconds)

    device = "cpu" if on_cpu() else "cuda"
    tokenizer = AutoTokenizer.from_pretrained(out / "llama")
    length = 128 if options.tiny else 1024
    held = blocks_from("builtin", tokenizer, split="heldout", length=length, count=None)[: options.blocks]

    def loss(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        return nats_per_token(model, held).nats

    parents = {twin: loss(out / twin) for twin in TWINS}
    print(f"{held[:, 1:].numel():,} held-out tokens; parents {parents}\n", flush=True)
    print("| cache | stage | twin | damage, nats | over the twin without norms | limit | seconds |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    with (out / "rows.jsonl").open("w") as file, tempfile.TemporaryDirectory() as work:
        for share in SHARES:
            for stage in ("closed form", *(["refit"] if options.refit else [])):
                plain = 0.0
                for twin, method in (("llama", "no norms"), ("qwen3", "mean scale"), ("qwen3", "regression")):
                    started = time.monotonic()
                    stand_in: Any = functools.partial(linear_stand_in, regress=method != "mean scale")
                    with mock.patch.object(target, "linear_stand_in", stand_in):
                        done: Any = convert_model(
                            out / twin,
                            Path(work, "mla"),
                            to="mla",
                            cache=share,
                            refit=options.refit if stage == "refit" else "off",
                            calibrate="builtin",
                            calibration_tokens=options.calibration_tokens,
                            device=device,
                            verify=False,
                            force=True,
                        )
                    damage = loss(Path(work, "mla")) - parents[twin]
                    plain = damage if method == "no norms" else plain
                    layout = done.plan.layouts_after[0]
                    row = {
                        "share": share,
                        "rank": layout.kv_lora_rank,
                        "rope_dim": layout.qk_rope_head_dim,
                        "stage": stage,
                        "twin": method,
                        "parent": parents[twin],
                        "damage": damage,
                        "ratio": damage / plain,
                        "limit": LIMITS[stage] if method == "regression" else None,
                        "seconds": round(time.monotonic() - started, 1),
                        "layers": list(done.layers.values()),
                    }
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    cache = f"{layout.kv_lora_rank}+{layout.qk_rope_head_dim} ({share - 1:.1%})"
                    print(
                        f"| {cache} | {stage} | {method} | "
                        f"{damage:.4f} | {row['ratio']:.2f} | {row['limit'] or ''} | {row['seconds']:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
