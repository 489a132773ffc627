"""Time `headwise eval --recipe quick` on a model of Llama-2-7B's shapes and its conversion to GQA. Prints JSON.

    python benchmarks/quick_eval.py WORK [--layers 32] [--groups 8] [--device cuda]
    python benchmarks/quick_eval.py WORK --parent MODEL --groups 2      # a model of yours

The checkpoint has random weights and a tokenizer of 2,048 tokens. Its texts do not end early, no draft token is
accepted, and its prompts have more tokens than those of a tokenizer of 32,000: a slow case. WORK keeps both models
(26 GB at 32 layers), and a second run takes them from there. The evaluation runs as the command line does, in a
process of its own, with imports and loading. The first of two runs measures the parent too, the second one has its
cached results. The models were just written, so most of their bytes come from the cache of the file system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import make

import headwise

BOUND = 300


def evaluate(child: Path, parent: Path, device: str, work: Path) -> dict[str, Any]:
    """Run the command once; return its seconds and what it reports about itself."""
    options = f"--recipe quick --device {device} --force --quiet --json".split()
    command = [sys.executable, "-m", "headwise", "eval", child, "--baseline", parent, "--report", work / "report"]
    kept = {"HEADWISE_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run([*command, *options], stdout=subprocess.PIPE, check=True, env=os.environ | kept)
    seconds = time.perf_counter() - start
    result = json.loads(done.stdout)
    return {
        "seconds": round(seconds, 1),
        "parent_cached": result["reused"],
        "stages": {stage: round(each, 1) for stage, each in result["seconds"].items()},
        "settings": {name: result["settings"][name] for name in ("batch_size", "dtype", "device")},
        "versions": result["versions"],
    }


def main() -> None:
    """Make both models, time the evaluation, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--parent", type=Path, help="a model in place of the random one")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    work, times = options.work, {}
    work.mkdir(parents=True, exist_ok=True)
    parent = options.parent or work / f"parent-{options.layers}"
    child = work / f"child-{parent.resolve().name}-{options.groups}"
    if not parent.exists():
        start = time.perf_counter()
        make(parent, layers=options.layers, device=options.device)
        times["make"] = round(time.perf_counter() - start, 1)
    if not child.exists():
        start = time.perf_counter()
        headwise.convert_model(
            parent, child, to="gqa", groups=options.groups, method="mean", calibrate="none", refit="off",
            verify=False, device="cpu",
        )  # fmt: skip
        times["convert"] = round(time.perf_counter() - start, 1)
    shutil.rmtree(work / "cache", ignore_errors=True)
    runs = [evaluate(child, parent, options.device, work) for _ in range(2)]
    versions = runs[0].pop("versions")
    runs[1].pop("versions")
    parameters = headwise.inspect_model(parent).parameters
    on_gpu = options.device != "cpu"
    result = {
        "parameters": parameters,
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "preparation_seconds": times,
        "runs": runs,
        "bound_seconds": BOUND,
        "within_bound": all(run["seconds"] <= BOUND for run in runs),
        "versions": versions,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
