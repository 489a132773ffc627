"""Measure how much of a conversion's damage each recipe recovers, and with how many tokens.

    python benchmarks/uptraining.py OUT --headlines             # the rows that have a target, three seeds
    python benchmarks/uptraining.py OUT --text mixed            # the grid: conversions, recipes and budgets
    python benchmarks/uptraining.py OUT --text mixed --sweep    # learning rates, batches and losses
    python benchmarks/uptraining.py OUT --only MLA --seconds 200

The benchmark converts the embedded model and uptrains each conversion with the package's own code, several runs at
a time on each GPU. Recipes that begin layer by layer share that stage. The parent and every result are measured in
float32 on all held-out modules. Rows are appended to OUT/results.jsonl, and a second call continues from them. The
last step writes OUT/table.md, gap.png and stages.png. One OUT belongs to one text.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from uptraining_report import write

MODEL = "headwise/demo/model"
PRETRAINING = 707_919_872
LENGTH = 1024
# Arguments of `convert_model`. The layer-by-layer stage is a separate step, so that runs can share its result.
TARGETS = {
    "GQA-2": {"to": "gqa", "groups": 2},
    "MQA": {"to": "mqa"},
    "MLA -75%": {"to": "mla", "rank": 96, "rope_dim": 32},
    "MLA -87.5%": {"to": "mla", "rank": 48, "rope_dim": 16},
    "MLA -94%": {"to": "mla", "rank": 16, "rope_dim": 16},
}
MERGES, LATENTS = ("mean", "aligned", "optimal"), ("transmla", "optimal")
# The Python library without its held-out modules; and the text of the parent's pretraining, nine tenths packages.
TEXTS = {"library": {"builtin": 1}, "mixed": {"builtin": 4, "packages": 1}}
# The rows that have a target: the budget in percent of the pretraining, and the target gap in nats.
HEADLINES = {
    ("GQA-2", 0.5): 0.01,
    ("MQA", 2.0): 0.01,
    ("MLA -75%", 0.25): 0.01,
    ("MLA -87.5%", 0.5): 0.01,
    ("MLA -94%", 2.0): 0.05,
}
SEEDS = 3


@dataclass(frozen=True)
class Task:
    """One run: target, method, and the step after the conversion (`convert` for none, `layerwise`, or a recipe)."""

    target: str
    method: str
    recipe: str
    percent: float = 0.0
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    swept: bool = False

    @property
    def name(self) -> str:
        extra = "".join(f"-{key}={value}" for key, value in self.settings.items()) + "-sweep" * self.swept
        text = f"{self.target}-{self.method}-{self.recipe}-{self.percent:g}-{self.seed}{extra}"
        return "".join(c if c.isalnum() or c in ".-=" else "_" for c in text)


def headlines() -> Iterator[Task]:
    """Yield the rows that have a target, over seeds."""
    for target, percent in HEADLINES:
        for seed in range(SEEDS):
            yield Task(target, "optimal", "two-stage", percent, seed)


def grid() -> Iterator[Task]:
    """Yield the runs of the grid, the most important first."""
    yield from headlines()
    for target, methods in (("GQA-2", MERGES), ("MQA", ("mean", "optimal"))):
        for method in methods:
            for recipe in ("paper", "distill", "two-stage"):
                if (target, method, recipe) != ("MQA", "optimal", "paper"):
                    yield Task(target, method, recipe, 1)
    for target, percent in (("MLA -75%", 0.25), ("MLA -87.5%", 0.5), ("MLA -94%", 2)):
        for method in LATENTS:
            yield Task(target, method, "distill", percent)
            if percent < 2:
                yield Task(target, method, "two-stage", percent)
    for target in TARGETS:
        for percent in (0.25, 0.5, 1, 2):
            if (target, percent) not in (("MQA", 0.25), ("MLA -94%", 0.25), ("MLA -75%", 2)):
                yield Task(target, "optimal", "two-stage", percent)
    yield Task("GQA-2", "mean", "paper", 5)
    yield Task("GQA-2", "optimal", "two-stage", 5)
    yield Task("GQA-2", "optimal", "distill", 5)


# One setting at a time, on two targets; then learning rates where the best is another.
SWEEP: tuple[dict[str, Any], ...] = (
    *({"learning_rate": rate} for rate in (1e-4, 2e-4, 4e-4, 8e-4)),
    {"learning_rate": 4e-4, "warmup": 0.25},
    {"learning_rate": 4e-4, "betas": [0.9, 0.99]},
    {"learning_rate": 2e-4, "batch_tokens": 4096},
    {"learning_rate": 4e-4, "attention_outputs": 0.3},
)
RATES = (
    ("MLA -75%", "optimal", "two-stage", 0.25, (1e-4, 2e-4, 4e-4)),
    ("MQA", "optimal", "two-stage", 2, (4e-4, 1e-3)),
    ("MLA -94%", "optimal", "two-stage", 2, (4e-4, 1e-3)),
    ("GQA-2", "mean", "paper", 1, (4e-4, 1e-3, 3e-3)),
)


def sweep() -> Iterator[Task]:
    for settings in SWEEP:
        for target in ("GQA-2", "MLA -87.5%"):
            yield Task(target, "optimal", "two-stage", 0.5, 0, settings, True)
    for target, method, recipe, percent, rates in RATES:
        for rate in rates:
            yield Task(target, method, recipe, percent, 0, {"learning_rate": rate}, True)


def learning_rate(task: Task) -> float:
    """Return the best rate of the sweep (docs/results/uptraining.md): larger for longer runs and more damage."""
    if task.recipe == "paper" or task.percent >= 2:
        return 1e-3
    return 2e-4 if task.target == "MLA -75%" and task.percent <= 0.25 else 4e-4


def batch_tokens(percent: float) -> int:
    """Return the batch size that gives some hundreds of steps at any budget."""
    return 8192 if percent <= 0.5 else 16384 if percent <= 2 else 32768


def recipe_of(task: Task, scale: float, text: str) -> Any:
    """Return the package's recipe with this benchmark's budget, as `--set` changes it."""
    from headwise.recipes.settings import Loss, load_uptrain_recipe

    name = "distill" if task.recipe == "two-stage" else task.recipe
    settings: dict[str, Any] = {"data.text": TEXTS[text], "data.heldout_blocks": 16}
    if name == "layerwise":
        stage = {"tokens": max(16 * LENGTH, int(scale * 1_000_000)), "steps": max(4, int(scale * 800))}
        settings |= {f"layerwise.{key}": value for key, value in stage.items()}
    else:
        train = {"learning_rate": learning_rate(task), "batch_tokens": batch_tokens(task.percent), **task.settings}
        settings |= {f"{'loss' if hasattr(Loss, key) else 'train'}.{key}": value for key, value in train.items()}
        batch, tokens = int(train["batch_tokens"]), max(1, int(scale * task.percent / 100 * PRETRAINING))
        settings |= {"train.tokens": -(-tokens // batch) * batch, "train.seed": task.seed, "train.save_every": 0}
    return load_uptrain_recipe(name, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def work(place: str | None, home: Path, scale: float, text: str, device: str, tasks: Any, results: Any) -> None:
    """Run tasks on one GPU until the process ends; packages are imported once."""
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place
    import numpy as np
    import torch

    from headwise.convert.pipeline import convert_model
    from headwise.io.reader import open_checkpoint
    from headwise.measure.loss import nats_per_token
    from headwise.progress import SILENT
    from headwise.recipes.run import Run
    from headwise.train.student import ModelFolder

    torch.set_num_threads(1)
    # The first task arrives after the text was written.
    task = tasks.get()
    blocks = torch.from_numpy(np.load(home / "blocks.npy"))
    heldout = torch.from_numpy(np.load(home / "heldout.npy")).long()

    class Shared(Run):
        """A run on the text blocks that all workers share."""

        def heldout_blocks(self) -> torch.Tensor:
            return heldout[: self.recipe.data.heldout_blocks]

        def training_blocks(self, tokens: int, seed: int) -> Any:
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
            return blocks[order[: -(-tokens // LENGTH)]], {name: {"times": n} for name, n in TEXTS[text].items()}

    def nats(folder: Path | str) -> float:
        network = ModelFolder.of(open_checkpoint(folder)).load(torch.float32).to(device)
        return nats_per_token(network, heldout, batch_size=16).nats

    def folder(task: Task, recipe: str) -> Path:
        return home / "models" / Task(task.target, task.method, recipe).name

    def do(task: Task) -> dict[str, Any]:
        if task.recipe == "parent":
            return {"nats": nats(MODEL)}
        if task.recipe == "convert":
            out = folder(task, "convert")
            arguments = {**TARGETS[task.target], "method": task.method, "refit": "off", "device": device}
            arguments |= {"calibrate": "builtin", "calibration_tokens": 98304 if scale == 1 else 8192}
            if task.method == "mean":
                arguments |= {"calibrate": "none"}
                del arguments["calibration_tokens"]
            if not out.exists():
                convert_model(MODEL, out, **arguments, verify=False)
            return {"nats": nats(out)}
        start = folder(task, "convert" if task.recipe in ("layerwise", "distill", "paper") else "layerwise")
        keep = task.recipe == "layerwise"
        out = folder(task, "layerwise") if keep else home / "runs" / task.name
        if keep and out.exists():
            return {"nats": nats(out)}
        out.parent.mkdir(parents=True, exist_ok=True)
        source, recipe = ModelFolder.of(open_checkpoint(start)), recipe_of(task, scale, text)
        run = Shared(recipe, task.recipe, source, MODEL, out, "", SILENT)
        done = run(resume=False, force=True, max_shard_size="5GB")
        tokens = recipe.layerwise.tokens if recipe.layerwise else done.tokens
        found = {"nats": nats(out), "tokens": tokens, "train_seconds": done.seconds}
        if not keep:
            shutil.rmtree(out)
        return found

    while True:
        began = time.time()
        try:
            found = do(task)
        except Exception:
            found = {"error": traceback.format_exc()}
        results.put((task, {**found, "text": text, "seconds": round(time.time() - began, 1)}))
        task = tasks.get()


def read_text(home: Path, percent: float, scale: float, text: str) -> None:
    """Write the training blocks for the largest budget, or all there are, and all held-out blocks."""
    import numpy as np
    from transformers import AutoTokenizer

    from headwise.text import blocks as data
    from headwise.text.sources import Data

    tokens = max(64 * LENGTH, int(1.1 * scale * percent / 100 * PRETRAINING))
    wanted, read = {"text": text, "scale": scale, "tokens": tokens}, home / "text.json"
    if read.exists():
        there = json.loads(read.read_text())
        if there | {"tokens": 0} != wanted | {"tokens": 0}:
            raise SystemExit(f"{home} has another text or scale: {there}; name another folder")
        if there["tokens"] >= tokens:
            return
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held = data.blocks_from("builtin", tokenizer, split="heldout", length=LENGTH)
    np.save(home / "heldout.npy", held.numpy()[: None if scale == 1 else 8])
    sources = TEXTS[text] if scale == 1 else {"builtin": 1}
    blocks, _ = data.training_blocks(Data(sources, LENGTH), tokenizer, tokens, seed=0)
    np.save(home / "blocks.npy", blocks.numpy())
    read.write_text(json.dumps(wanted))


def _gpus() -> list[str]:
    """Return the names of the visible GPUs, without loading CUDA."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


class Pool:
    """The worker processes and the results file."""

    def __init__(self, home: Path, jobs: int, scale: float, text: str, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results, self.file = context.Queue(), context.Queue(), home / "results.jsonl"
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.deadline = float("inf")
        arguments = (home, scale, text, device, self.tasks, self.results)
        gpus = _gpus() if device == "cuda" else []
        places = [gpus[i % len(gpus)] if gpus else None for i in range(jobs)]
        self.workers = [context.Process(target=work, args=(p, *arguments), daemon=True) for p in places]
        for worker in self.workers:
            worker.start()

    def run(self, tasks: list[Task]) -> list[dict[str, Any]]:
        """Return the rows of these tasks. Finished runs are not repeated, and none starts after the deadline."""
        tasks = list({task.name: task for task in tasks}.values())
        names = [task.name for task in tasks]
        done = {row["name"] for row in self.rows}
        waiting = [task for task in tasks if task.name not in done]
        under_way = 0
        while under_way or (waiting and time.time() < self.deadline):
            while waiting and under_way < len(self.workers) and time.time() < self.deadline:
                self.tasks.put(waiting.pop(0))
                under_way += 1
            try:
                task, found = self.results.get(timeout=10)
            except queue.Empty:
                if not all(worker.is_alive() for worker in self.workers):
                    raise SystemExit("a worker process has ended; see its output") from None
                continue
            under_way -= 1
            row = {"name": task.name, **asdict(task), **found}
            if "error" in row:
                print(row["error"], flush=True)
                continue
            self.rows.append(row)
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = f"{row['nats']:.4f} nats, {row['seconds']:.0f} s"
            print(f"{time.strftime('%H:%M:%S')} {task.name}: {shown}", flush=True)
        if waiting:
            print(f"{len(waiting)} runs were not started before the deadline", flush=True)
        return [row for row in self.rows if row["name"] in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", choices=TEXTS, default="library")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--headlines", action="store_true", help="only the rows that have a target")
    what.add_argument("--sweep", action="store_true", help="learning rates, batches and losses")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of every budget, for a trial")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    began = time.time()
    home = options.out
    (home / "models").mkdir(parents=True, exist_ok=True)
    device = options.device or ("cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    pool = Pool(home, options.jobs, options.scale, options.text, device)
    asked = headlines() if options.headlines else sweep() if options.sweep else grid()
    planned = [task for task in asked if options.only in task.name]
    if not planned:
        raise SystemExit(f"no name of a run contains {options.only!r}")
    starts = list(dict.fromkeys((task.target, task.method) for task in planned))
    read_text(home, max(task.percent for task in planned), options.scale, options.text)
    print(f"{time.time() - began:.0f} s: text is read", flush=True)
    parent = pool.run([Task("MHA", "parent", "parent")])[0]["nats"]
    ready = len(pool.run([Task(*start, "convert") for start in starts]))
    refitted = {(t.target, t.method) for t in planned if t.recipe == "two-stage"}
    ready += len(pool.run([Task(*start, "layerwise") for start in starts if start in refitted]))
    if ready < len(starts) + len(refitted):
        raise SystemExit("a conversion or layer-by-layer run failed; its traceback is above")
    print(f"{time.time() - began:.0f} s: converted and refitted", flush=True)
    pool.deadline = began + options.seconds
    pool.run(planned)
    for worker in pool.workers:
        worker.terminate()
    write(home, pool.rows, parent, HEADLINES)
    print(f"{time.time() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
