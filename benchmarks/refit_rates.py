"""Learning rates and steps of a joint refit: one closed form, one sampled text, and a JSON line for each variant.

    python -m benchmarks.refit_rates MODEL --target mla:128+64 --variants 0.1:1000:0 0.01:300:1000 --text DIR
    python -m benchmarks.refit_rates headwise/demo/model --target mla:192+64 --variants 0.1:40:0 0.01:40:0

A variant is RATE:STEPS:KL, the peak rate and the steps of the regression, and the steps of KL after it. The losses
before and after a stage are of sampled text that is held back, in nats per token. With DIR, as real_model.py takes
it, the losses of its three texts follow. Text, steps and sequences are those of a conversion on this device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.quality import target
from benchmarks.real_model import sample, texts
from headwise.convert.pipeline import convert_model
from headwise.convert.refit import joint_plan
from headwise.io.reader import open_checkpoint
from headwise.measure.loss import nats_per_token
from headwise.text.repeats import join_rows, repeat_passages
from headwise.train import recovery
from headwise.train.student import ModelFolder, Student


def main() -> None:
    """Convert once, then train and measure every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--target", required=True, metavar="gqa:G|mla:RANK+ROPE")
    parser.add_argument("--variants", nargs="+", required=True, metavar="RATE:STEPS:KL")
    parser.add_argument("--text", type=Path, help="folder of the three texts")
    parser.add_argument("--sampled", type=Path, help="file of the sampled text; it is made if it does not exist")
    parser.add_argument("--refit-tokens", type=int, help="distinct tokens of that text")
    parser.add_argument("--calibrate", default="sampled")
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    usual = joint_plan.GPU_PLAN if options.device.startswith("cuda") else joint_plan.CPU_PLAN
    plan = joint_plan.scaled_plan(usual, options.refit_tokens)
    parent, device = ModelFolder.of(open_checkpoint(options.model)), torch.device(options.device)
    held = texts(AutoTokenizer.from_pretrained(options.model), options.text) if options.text else {}
    with tempfile.TemporaryDirectory() as scratch:
        sampled = options.sampled or Path(scratch, "sampled.safetensors")
        if not sampled.exists():
            sample(options.model, sampled, options.seed, options.device, options.refit_tokens, 1.0)
        blocks = load_file(sampled)["tokens"].long()
        rows = repeat_passages(join_rows(blocks[plan.heldout :], plan.length), plan.repeats, options.seed)
        convert_model(
            options.model,
            Path(scratch, "closed"),
            **target(options.target),
            refit="off",
            verify=False,
            calibrate=options.calibrate,
            calibration_tokens=options.calibration_tokens,
            seed=options.seed,
            device=options.device,
        )
        closed = ModelFolder.of(open_checkpoint(Path(scratch, "closed")))
        for variant in options.variants:
            rate, steps, kl_steps = variant.split(":")
            student, begun = Student.load(closed, parent), time.monotonic()
            with patch.multiple(recovery, REGRESSION_RATE=float(rate), SETTLED={"mla": 1, "gqa": 1}):
                reports = recovery.recover_jointly(
                    student,
                    parent,
                    rows,
                    blocks[: plan.heldout],
                    replace(plan, regression_steps=int(steps), kl_steps=int(kl_steps)),
                    Path(scratch, variant),
                    seed=options.seed,
                    device=device,
                )
            row: dict[str, Any] = {"target": options.target, "variant": variant}
            row |= {"seconds": round(time.monotonic() - begun)}
            row |= {each.stage: [round(each.before, 4), each.after] for each in reports}
            network = student.network.eval()
            row |= {name: round(nats_per_token(network, tokens).nats, 4) for name, tokens in held.items()}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
