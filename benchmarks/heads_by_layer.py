"""Measure what a number of KV heads of its own for each layer would save, against one number for all layers.

    python benchmarks/heads_by_layer.py [PARENT] --groups 1 2 4 [--calibrate builtin] [--heldout builtin]

No stock class reads such a model (docs/decisions/0045), so the mixed models exist in memory only: the attention of
single layers of uniform conversions takes the place of the parent's. The damage of each layer at each number is the
loss of the model with that layer alone replaced, above the parent's loss. Dynamic programming chooses the numbers
with the least sum under a budget of the cache; the chosen model is then measured whole. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from layer_damage import Guest
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.pipeline import convert_model
from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.loss import nats_per_token
from headwise.text.blocks import blocks_from


def choose_counts(damage: dict[int, list[float]], budget: int) -> list[int]:
    """Return the number of KV heads of every layer with the least sum of damages.

    Args:
        damage: nats per token of each layer alone, by the number of KV heads; the parent's number has zeros.
        budget: KV heads of all layers together, at most.
    """
    num_layers = len(next(iter(damage.values())))
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in range(num_layers):
        grown: dict[int, tuple[float, list[int]]] = {}
        for used, (total, counts) in best.items():
            for count, losses in damage.items():
                if (more := used + count) > budget:
                    continue
                candidate = (total + losses[layer], [*counts, count])
                if more not in grown or candidate < grown[more]:
                    grown[more] = candidate
        best = grown
    return min(best.values())[1]


def main() -> None:
    """Convert uniformly, measure every layer, choose, and measure the choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", default=str(EMBEDDED_MODEL))
    parser.add_argument("--groups", type=int, nargs="+", required=True, help="numbers of KV heads to choose from")
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="shares of the cache besides these")
    parser.add_argument("--calibrate", default="builtin")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--refit", default="off")
    parser.add_argument("--heldout", default="builtin", help="text to measure on")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.parent)
    text: dict[str, Any] = {"length": options.length, "count": options.blocks}
    blocks = blocks_from(options.heldout, tokenizer, split="heldout", **text)

    def load(folder: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()

    parent = load(options.parent)
    whole = parent.config.num_key_value_heads
    own = [layer.self_attn for layer in parent.model.layers]
    base = nats_per_token(parent, blocks, batch_size=2).nats
    print(json.dumps({"parent": base, "tokens": blocks[:, 1:].numel(), "num_key_value_heads": whole}), flush=True)
    guests: dict[int, list[Any]] = {whole: own}
    for count in options.groups:
        with tempfile.TemporaryDirectory() as folder:
            convert_model(
                options.parent, Path(folder, "out"), to="gqa", groups=count, calibrate=options.calibrate,
                calibration_tokens=options.calibration_tokens, refit=options.refit, verify=False,
                device=options.device,
            )  # fmt: skip
            child = load(Path(folder, "out"))
        guests[count] = [Guest(layer.self_attn, child.model.rotary_emb) for layer in child.model.layers]

    def loss(counts: list[int]) -> float:
        for layer, number, count in zip(parent.model.layers, range(len(own)), counts, strict=True):
            layer.self_attn = guests[count][number]
        nats = nats_per_token(parent, blocks, batch_size=2).nats
        return nats - base

    damage = {whole: [0.0] * len(own)}
    for count in options.groups:
        damage[count] = []
        for layer in range(len(own)):
            damage[count].append(loss([count if other == layer else whole for other in range(len(own))]))
        print(json.dumps({"groups": count, "damage": damage[count]}), flush=True)
    shares = sorted({*options.budgets, *(count / whole for count in options.groups)})
    for share in shares:
        budget = round(share * whole * len(own))
        counts = choose_counts(damage, budget)
        result: dict[str, Any] = {"cache": share, "counts": counts, "heads": sum(counts), "loss": loss(counts)}
        result["sum"] = sum(damage[count][layer] for layer, count in enumerate(counts))
        if (uniform := round(share * whole)) in guests and uniform * len(own) == budget:
            result["uniform"] = loss([uniform] * len(own))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
