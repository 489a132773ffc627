"""Convert a real model and measure the loss on three texts, target by target; one JSON line each.

    python benchmarks/real_model.py MODEL --text DIR --targets parent mla:128+64 gqa:1 --refit joint
    python benchmarks/real_model.py MODEL --text DIR --targets mla:128+64 --method transmla --refit off

DIR holds wikitext2_raw_test.txt and tinystories_heldout.jsonl. Protocol: text without special tokens in blocks of
1,024; WikiText-2: the first half by characters, 96 blocks; stories: 32 blocks; code: the `email` package of this
Python's standard library, 32 blocks. Models run in float32 (TF32 on a GPU).
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import target
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.measure.loss import nats_per_token
from headwise.progress import Progress

LENGTH = 1024


class Shown(Progress):
    """Print the stages with their times."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Print a new stage."""
        print(f"{time.monotonic() - self.start:7.1f} s  {name}", flush=True)
        self.done, self.total, self.shown = 0, total, time.monotonic()

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Print how much is done, every half minute."""
        self.done += amount
        if time.monotonic() - self.shown > 30:
            self.shown = time.monotonic()
            print(f"{self.shown - self.start:7.1f} s    {self.done:,} of {self.total or 0:,} {fields}", flush=True)


def blocks(tokenizer: Any, text: str, count: int) -> Tensor:
    """Return blocks of a text's tokens, (count, LENGTH) or fewer."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:count]


def texts(tokenizer: Any, folder: Path) -> dict[str, Tensor]:
    """Return the blocks of the three texts."""
    wiki = (folder / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    stories = (folder / "tinystories_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    library = sorted(Path(sysconfig.get_paths()["stdlib"], "email").glob("*.py"))
    return {
        "wiki": blocks(tokenizer, wiki[: len(wiki) // 2], 96),
        "stories": blocks(tokenizer, " ".join(json.loads(line)["text"] for line in stories), 32),
        "code": blocks(tokenizer, "".join(path.read_text(errors="ignore") for path in library), 32),
    }


def measure(folder: str | Path, held: dict[str, Tensor], device: str) -> dict[str, float]:
    """Return nats per token on every text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return {name: round(nats_per_token(model, tokens).nats, 4) for name, tokens in held.items()}


def main() -> None:
    """Convert and measure every target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", required=True, metavar="parent|gqa:G|mla:RANK+ROPE")
    parser.add_argument("--method", default="optimal")
    parser.add_argument("--calibrate", default="sampled")
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--refit", default="joint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    held = texts(AutoTokenizer.from_pretrained(options.model), options.text)
    for name in options.targets:
        row: dict[str, Any] = {
            "target": name,
            "method": options.method,
            "refit": options.refit,
            "seed": options.seed,
        }
        if name == "parent":
            print(json.dumps({"target": name} | measure(options.model, held, options.device)), flush=True)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            start = time.monotonic()
            done = convert_model(
                options.model,
                Path(scratch) / "out",
                **target(name),
                method=options.method,
                calibrate=options.calibrate,
                calibration_tokens=options.calibration_tokens,
                refit=int(options.refit) if options.refit.isdecimal() else options.refit,
                seed=options.seed,
                device=options.device,
                progress=Shown(),
            )
            assert isinstance(done, ConvertResult) and done.verification is not None
            row |= {"seconds": round(time.monotonic() - start), "verified": done.verification.passed}
            row |= {"stages": done.refit, **measure(done.out, held, options.device)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
