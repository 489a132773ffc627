"""Damage of conversions, in nats per token over the parent on held-out text, method by method.

    python benchmarks/quality.py --targets gqa:4 gqa:2 gqa:1 --methods mean aligned optimal
    python benchmarks/quality.py --targets mla:128+32 mla:96+32 mla:48+16 --methods transmla optimal
    python benchmarks/quality.py --targets gqa:2 mla:96+32 --methods optimal --refit 400

Every conversion is the library's own `convert`, calibrated on the same text; baselines share one measurement of the
parent. Prints a Markdown table; --json keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.pipeline import convert_model
from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.loss import nats_per_token
from headwise.text.blocks import blocks_from


def target(text: str) -> dict[str, Any]:
    """ "gqa:4" or "mla:96+32" -> arguments of `convert`; "mha" and "mla" alone are the exact ones."""
    kind, _, shape = text.partition(":")
    if text in ("mha", "mla"):
        return {"to": text} | ({"exact": True} if text == "mla" else {})
    if kind == "mla":
        rank, rope_dim = shape.split("+")
        return {"to": "mla", "rank": int(rank), "rope_dim": int(rope_dim)}
    return {"to": "gqa", "groups": int(shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument("--targets", nargs="+", required=True, metavar="gqa:G|mla:RANK+ROPE")
    parser.add_argument("--methods", nargs="+", default=["optimal"])
    parser.add_argument("--grouping", choices=("optimal", "contiguous"), help="default: the method's own")
    parser.add_argument("--rope-frequencies", default="default", choices=("default", "free"))
    parser.add_argument("--refit", type=int, default=0, help="steps per layer")
    parser.add_argument("--unsolved", action="store_true", help="closed forms alone, without output matrices")
    parser.add_argument("--calibrate", default="builtin")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--heldout", default="builtin", help="text to measure on: builtin or a file")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--blocks", type=int, help="of held-out text (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held = blocks_from(options.heldout, tokenizer, split="heldout", length=options.length, count=None)[
        : options.blocks
    ]

    def loss(folder: str | Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device)
        return nats_per_token(model, held).nats

    parent = loss(options.model)
    print(f"{held[:, 1:].numel():,} held-out tokens; parent {parent:.4f} nats per token\n", flush=True)
    print(
        "| target | method | cache, bytes per token | damage, nats | seconds |\n|---|---|---|---|---|", flush=True
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        moments = Path(folder, "moments")
        text = {"calibrate": options.calibrate, "calibration_tokens": options.calibration_tokens}
        for wanted in options.targets:
            for method in options.methods:
                start = time.monotonic()
                arguments: dict[str, Any] = {**target(wanted), "method": method, "device": options.device}
                if arguments["to"] == "mla":
                    arguments["rope_frequencies"] = options.rope_frequencies
                elif options.grouping:
                    arguments["grouping"] = options.grouping
                arguments["refit"] = options.refit or "off"
                out = Path(folder, "out")
                if options.refit or (method == "optimal" and not options.unsolved):
                    arguments |= text
                else:
                    if not moments.exists():
                        given = {**arguments, **text, "save_moments": moments}
                        convert_model(options.model, out, **given, verify=False, force=True)
                    arguments["moments"] = moments
                done: Any = convert_model(options.model, out, **arguments, verify=False, force=True)
                seconds = time.monotonic() - start
                row = {
                    "target": wanted,
                    "method": method,
                    "cache": done.plan.cache_after.bytes_per_token,
                    "damage": loss(out) - parent,
                    "seconds": seconds,
                }
                rows.append(row)
                print(
                    f"| {wanted} | {method} | {row['cache']:,} | {row['damage']:.4f} | {seconds:.0f} |", flush=True
                )
    if options.json:
        options.json.write_text(json.dumps({"parent": parent, "options": vars(options), "rows": rows}, default=str))


if __name__ == "__main__":
    main()
