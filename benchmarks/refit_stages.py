"""Compare what follows the regression of a joint refit: windows of layers, or KL to the parent.

    python benchmarks/refit_stages.py --targets gqa:1 mla:224+32
    python benchmarks/refit_stages.py --model MODEL --targets gqa:1 --steps 300 300

Every target is converted in closed form and regressed once. Both second stages start from the result, on the same
text, which the parent samples. Losses are nats per token on sampled text that is held back; one JSON line for each
target.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.quality import target
from headwise.convert.pipeline import convert_model
from headwise.io.reader import open_checkpoint
from headwise.io.source import EMBEDDED_MODEL
from headwise.text.sampled import sample_tokens
from headwise.train.recovery import JointPlan, recover_jointly
from headwise.train.student import ModelFolder, Student, load_for_sampling


def main() -> None:
    """Convert, refit and measure every target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument("--targets", nargs="+", required=True, metavar="gqa:G|mla:RANK+ROPE")
    parser.add_argument("--steps", nargs=2, type=int, default=[100, 60], help="of the regression; of what follows")
    parser.add_argument("--sequences", type=int, default=4, help="in a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--blocks", nargs=2, type=int, default=[400, 48], help="of training text; held back")
    parser.add_argument("--sampled", type=Path, help="file of the sampled text; it is made if it does not exist")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    parent = ModelFolder.of(open_checkpoint(options.model))
    count, heldout = options.blocks
    with tempfile.TemporaryDirectory() as scratch:
        sampled = options.sampled or Path(scratch, "sampled.safetensors")
        if not sampled.exists():
            model, tokenizer = (
                load_for_sampling(parent.checkpoint, device),
                AutoTokenizer.from_pretrained(options.model),
            )
            tokens = sample_tokens(
                model, tokenizer, sequences=count + heldout, length=options.length, seed=options.seed
            )
            save_file({"tokens": tokens.to(torch.int32)}, sampled)
        blocks = load_file(sampled)["tokens"].long()
        for name in options.targets:
            work = Path(scratch, name.replace(":", "-"))
            convert_model(
                options.model,
                work / "closed",
                **target(name),
                refit="off",
                calibrate="mixture",
                calibration_tokens=options.calibration_tokens,
                device="cpu",
            )
            closed = ModelFolder.of(open_checkpoint(work / "closed"))
            row = {"target": name}
            for stage in ("windows", "kl"):
                plan = JointPlan(
                    tokens=count * options.length,
                    regression_steps=options.steps[0],
                    kl_steps=options.steps[1] * (stage == "kl"),
                    windows_steps=options.steps[1] * (stage == "windows"),
                    sequences=options.sequences,
                    length=options.length,
                    sampled_length=options.length,
                    heldout=heldout,
                )
                begun = time.monotonic()
                reports = recover_jointly(
                    Student.load(closed, parent),
                    parent,
                    blocks[heldout:],
                    blocks[:heldout],
                    plan,
                    work / stage,
                    seed=options.seed,
                    device=device,
                )
                row |= {f"{stage}_seconds": round(time.monotonic() - begun)}
                row |= {report.stage: [round(report.before, 4), report.after] for report in reports}
                if stage == "windows":  # the other stage begins from the same regression
                    shutil.copytree(work / stage / "regression", work / "kl" / "regression")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
