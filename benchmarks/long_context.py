"""Four times the demo model's context: every rule without training, four of them after 2% of its training.

    python benchmarks/long_context.py --out FOLDER

Writes results.json, before.png, after.png and the passkey grids. Dynamic scaling is measured as one forward pass
over the whole length, so its curve at short positions is that of the longest input.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwise
from headwise.convert.positions import context
from headwise.convert.positions import rope_bound as bound
from headwise.environment import versions
from headwise.eval.report import plots
from headwise.eval.tasks import passkey
from headwise.measure import positions
from headwise.models import architecture, rope
from headwise.recipes.outcome import RECORDED_PACKAGES, hardware
from headwise.recipes.settings import load_uptrain_recipe
from headwise.text import blocks as data
from headwise.text.packing import collator
from headwise.train.trainer import Task, make_trainer, resume

UPTRAINED = ("plain", "ntk", "yarn", "base")


def extended(config: dict[str, Any], length: int) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Config and notes of every rule; `plain` only claims the length."""
    arch = architecture.find_architecture(config)
    (layers,) = context.rope_sets(config, arch)
    base = bound.smallest_base(layers.rotary_dim, length).always_from
    made = {"plain": (config | {"max_position_embeddings": length}, ["no rule"])}
    for rule in rope.RULES:
        theta = base if rule == "base" else None
        made[rule] = context.extend_context(config, arch, context=length, rule=rule, rope_theta=theta)
    return made


def load(folder: Path, config: dict[str, Any], device: str) -> Any:
    """The model's weights under another config, in float32."""
    stock = architecture.find_architecture(config).stock_config(config)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=copy.deepcopy(stock), dtype=torch.float32)
    return model.to(device).eval()


def summary(curve: positions.PositionLoss, trained: int) -> dict[str, Any]:
    return curve.to_dict() | {"at_trained": curve.before(trained), "end": curve.end, "first": curve.nats[0]}


def retrieval(model: Any, tokenizer: Any, lengths: list[int], samples: int) -> dict[tuple[int, float], float]:
    found = passkey.make_passkey_documents(tokenizer, lengths=lengths, samples=samples)
    return passkey.passkey_shares(passkey.solve_passkeys(model, tokenizer, found))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(headwise.__file__).parent / "demo" / "model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, help="held-out text in blocks of the new length (default: all)")
    parser.add_argument("--samples", type=int, default=10, help="passkeys per point of the grid")
    parser.add_argument("--rules", nargs="*", help="of those without training (default: all)")
    parser.add_argument("--curves", action="store_true", help="losses without training alone, and no passkeys")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="on the recipe")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    config = json.loads((options.model / "config.json").read_text())
    trained = config["max_position_embeddings"]
    length = options.factor * trained
    width = trained // 4
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    heldout = data.builtin_blocks(tokenizer, "heldout", length, options.blocks)
    windows = positions.overlapping_windows(heldout, length, width)
    say(f"{heldout.numel():,} held-out tokens, {len(windows)} windows of {length}")
    lengths = [trained // 2, trained, 2 * trained, length]
    configs = extended(config, length)
    results: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "hardware": hardware(),
        "versions": versions(RECORDED_PACKAGES),
        "trained": trained,
        "context": length,
        "notes": {rule: notes for rule, (_, notes) in configs.items()},
        "before": {},
        "after": {},
        "passkey": {},
    }

    def measure(model: Any, name: str, stage: str) -> positions.PositionLoss:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            curve = positions.loss_by_position(model, windows, width=width, batch_size=4)
            grid = {} if options.curves else retrieval(model, tokenizer, lengths, options.samples)
        results[stage][name] = summary(curve, trained)
        results["passkey"][f"{name} {stage}"] = {f"{size} {depth}": share for (size, depth), share in grid.items()}
        if grid:
            plots.plot_passkey_grid(
                grid, options.out / f"passkey-{name}-{stage}.png", f"Passkey: {name}, {stage} training"
            )
        (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        found = f"; passkey {sum(grid.values()) / len(grid):.0%}" if grid else ""
        say(f"{stage} {name}: {curve.before(trained):.4f} at {trained}, {curve.end:.4f} at {length}{found}")
        return curve

    before = {}
    for rule in options.rules or configs:
        before[rule] = measure(load(options.model, configs[rule][0], options.device), rule, "before")
    plots.plot_loss_by_position(before, options.out / "before.png", trained)
    if options.curves:
        return

    recipe = load_uptrain_recipe("long-context", [f"data.length={length}", *options.set])
    blocks, text = data.training_blocks(recipe.data, tokenizer, recipe.train.tokens, recipe.train.seed)
    results["text"] = text
    say(f"{len(blocks)} training blocks of {length}")
    few = heldout[: recipe.data.heldout_blocks]
    after = {"not extended": before["plain"]} if "plain" in before else {}
    for rule in UPTRAINED:
        model = load(options.model, configs[rule][0], "cpu")
        work = options.out / f"uptrain-{rule}"
        work.mkdir(exist_ok=True)
        started = time.time()
        trainer = make_trainer(
            model,
            blocks,
            few,
            recipe.train,
            Task(recipe.loss),
            work,
            length=length,
            collate=collator(model, recipe.data.separate_documents),
        )
        resume(trainer, None)
        model.eval()
        results.setdefault("seconds", {})[rule] = round(time.time() - started, 1)
        after[rule] = measure(model.to(options.device), rule, "after")
    plots.plot_loss_by_position(after, options.out / "after.png", trained)


if __name__ == "__main__":
    main()
