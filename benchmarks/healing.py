"""How much of a conversion's damage each recipe heals, and with how many tokens.

    python benchmarks/healing.py OUT --sweep            # learning rates and losses, on two targets
    python benchmarks/healing.py OUT                    # the grid: conversions, recipes and budgets
    python benchmarks/healing.py OUT --only mla --seconds 200

Converts the embedded model, refits each conversion layer by layer where the recipe begins with that, and uptrains
it with the library's own `uptrain`, several runs at a time on one GPU. Every model is measured in float32 on all
held-out modules, the parent in the same run. Results go to OUT/results.jsonl as they come: a second call goes on
where the first was stopped. Ends with OUT/table.md and OUT/gap.png.
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

from healing_report import write

MODEL = "headwise/demo/model"
PRETRAINING = 707_919_872
LENGTH = 1024
# What convert is asked for. The layer-by-layer stage is its own step here, so that runs can share its result.
TARGETS = {
    "GQA-2": {"to": "gqa", "groups": 2},
    "MQA": {"to": "mqa"},
    "MLA -75%": {"to": "mla", "rank": 96, "rope_dim": 32},
    "MLA -87.5%": {"to": "mla", "rank": 48, "rope_dim": 16},
    "MLA -94%": {"to": "mla", "rank": 16, "rope_dim": 16},
}
MERGES, LATENTS = ("mean", "aligned", "optimal"), ("transmla", "optimal")
# The rows that have a number to reach, in percent of the pretraining, and the gap to reach.
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
    """One run: what to convert to, how, and what to do then (`convert`, `layerwise`, or a recipe)."""

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


def grid() -> Iterator[Task]:
    """The runs, those that matter most first."""
    for (target, percent), _ in HEADLINES.items():
        for seed in range(SEEDS):
            yield Task(target, "optimal", "two-stage", percent, seed)
    for target in TARGETS:
        latent = target.startswith("MLA")
        for method in LATENTS if latent else MERGES:
            best = method == "optimal"
            budgets = {"MLA -75%": (0.25, 1), "MLA -87.5%": (0.5, 2), "MLA -94%": (2,)}.get(target, (0.5, 1))
            for percent in budgets:
                yield Task(target, method, "distill", percent)
            for percent in (0.25, 0.5, 1, 2) if best else budgets:
                yield Task(target, method, "two-stage", percent)
            if not latent:
                yield Task(target, method, "paper", 1)
    for target in ("GQA-2", "MQA"):
        yield Task(target, "mean", "paper", 5)
        yield Task(target, "optimal", "distill", 5)
        yield Task(target, "optimal", "paper", 5)
        yield Task(target, "optimal", "two-stage", 5)
        yield Task(target, "mean", "distill", 5)
    yield Task("MLA -94%", "optimal", "two-stage", 5)
    for target in ("MLA -75%", "MLA -87.5%"):
        yield Task(target, "optimal", "paper", 1)


# One setting at a time beside the first; those that help are then tried together.
BASE = {"learning_rate": 2e-4}
SWEEP = (
    {},
    {"learning_rate": 1e-4},
    {"learning_rate": 4e-4},
    {"learning_rate": 1e-3},
    {"batch_tokens": 4096},
    {"batch_tokens": 16384},
    {"kl": 1.0},
    {"schedule": "wsd"},
    {"hidden_states": 0.3},
    {"weight_decay": 0.0},
    {"separate_documents": False},
    {"parameters": "attention"},
)
SWEPT, PERCENT = ("GQA-2", "MLA -87.5%"), 0.5
# What a setting has to win over the first, in nats.
WORTH = 0.0015


def sweep(*settings: dict[str, Any]) -> list[Task]:
    return [
        Task(target, "optimal", "two-stage", PERCENT, 0, {**BASE, **change}, True)
        for change in settings
        for target in SWEPT
    ]


def batch_tokens(percent: float) -> int:
    """Some hundreds of steps, whatever the budget."""
    return 8192 if percent <= 0.5 else 16384 if percent <= 2 else 32768


def recipe_of(task: Task, scale: float, chosen: dict[str, Any]) -> Any:
    """The library's recipe with this benchmark's budget: what `--set` would do."""
    from headwise.recipes.schema import load

    name = "paper" if task.recipe == "paper" else "layerwise" if task.recipe == "layerwise" else "distill"
    settings = {"data.text": "{builtin: 4, packages: 1}", "data.heldout_blocks": 16}
    if name == "layerwise":
        stage = {"tokens": max(16 * LENGTH, int(scale * 1_000_000)), "steps": max(4, int(scale * 800))}
        settings |= {f"layerwise.{key}": value for key, value in stage.items()}
        return load(name, [f"{key}={value}" for key, value in settings.items()])
    tokens = max(1, int(scale * task.percent / 100 * PRETRAINING))
    train = {"batch_tokens": batch_tokens(task.percent), **chosen, **task.settings}
    for key, value in train.items():
        place = "data" if key == "separate_documents" else "loss"
        settings[f"{place if key in LOSSES or place == 'data' else 'train'}.{key}"] = value
    if train.get("kl") == 1.0:
        settings["loss.cross_entropy"] = 0.0
    batch = int(train["batch_tokens"])
    settings |= {"train.tokens": -(-tokens // batch) * batch, "train.seed": task.seed, "train.save_every": 0}
    return load(name, [f"{key}={json.dumps(value)}" for key, value in settings.items() if key != "data.text"])


LOSSES = ("kl", "reverse_kl", "jsd", "hidden_states", "attention_outputs", "cross_entropy")


def work(
    place: int | None, home: Path, scale: float, chosen: dict[str, Any], device: str, tasks: Any, results: Any
) -> None:
    """A worker: imports once, then does what it is given, on one GPU."""
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
    import numpy as np
    import torch

    from headwise.convert.checkpoint import open_checkpoint
    from headwise.convert.pipeline import convert
    from headwise.eval.perplexity import nats_per_token
    from headwise.progress import SILENT
    from headwise.recipes.run import Run
    from headwise.recipes.student import ModelFolder

    torch.set_num_threads(1)
    # The first task comes when the text has been read.
    task = tasks.get()
    blocks = torch.from_numpy(np.load(home / "blocks.npy"))
    heldout = torch.from_numpy(np.load(home / "heldout.npy")).long()

    class Shared(Run):
        """A run whose text was read once for all."""

        def heldout_blocks(self) -> torch.Tensor:
            return heldout[: self.recipe.data.heldout_blocks]

        def training_blocks(self, tokens: int, seed: int) -> Any:
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
            return blocks[order[: -(-tokens // LENGTH)]], {"builtin": {"times": 4}, "packages": {"times": 1}}

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
            arguments["calibration_tokens"] = 98304 if scale == 1 else 8192
            if task.method == "mean":
                arguments |= {"calibrate": "none"}
                del arguments["calibration_tokens"]
            if not out.exists():
                convert(MODEL, out, **arguments, verify=False)
            return {"nats": nats(out)}
        start = folder(task, "convert" if task.recipe in ("layerwise", "distill", "paper") else "layerwise")
        keep = task.recipe == "layerwise"
        out = folder(task, "layerwise") if keep else home / "runs" / task.name
        if keep and out.exists():
            return {"nats": nats(out)}
        out.parent.mkdir(parents=True, exist_ok=True)
        source, recipe = ModelFolder.of(open_checkpoint(start)), recipe_of(task, scale, chosen)
        run = Shared(recipe, task.recipe, source, MODEL, out, "", SILENT)
        done = run(resume=False, force=True, max_shard_size="5GB")
        found = {"nats": nats(out), "tokens": done.tokens, "train_seconds": done.seconds, "start": done.before}
        curve = out / "uptraining.csv"
        if curve.exists():
            found["curve"] = [line.split(",")[1::2][:2] for line in curve.read_text().splitlines()[1:]]
        if not keep:
            shutil.rmtree(out)
        return found

    while True:
        began = time.time()
        try:
            found = do(task)
        except Exception:
            found = {"error": traceback.format_exc()}
        results.put((task, {**found, "seconds": round(time.time() - began, 1)}))
        task = tasks.get()


def read_text(home: Path, percent: float, scale: float) -> None:
    """Blocks of the training text, enough for the largest budget, and all held-out blocks."""
    import numpy as np
    from transformers import AutoTokenizer

    from headwise.recipes import data
    from headwise.recipes.schema import Data

    if (home / "blocks.npy").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held = data.blocks_from("builtin", tokenizer, split="heldout", length=LENGTH)
    np.save(home / "heldout.npy", held.numpy()[: None if scale == 1 else 8])
    text = {"builtin": 4, "packages": 1} if scale == 1 else {"builtin": 1}
    tokens = max(64 * LENGTH, int(1.1 * scale * percent / 100 * PRETRAINING))
    blocks, _ = data.training_blocks(Data(text, LENGTH), tokenizer, tokens, seed=0)
    np.save(home / "blocks.npy", blocks.numpy())


class Pool:
    """Workers that live as long as the benchmark, and the results file."""

    def __init__(self, home: Path, jobs: int, scale: float, chosen: dict[str, Any], device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks, self.results, self.file = context.Queue(), context.Queue(), home / "results.jsonl"
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.deadline = float("inf")
        arguments = (home, scale, chosen, device, self.tasks, self.results)
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if device == "cuda" else 0
        places = [i % gpus if gpus else None for i in range(jobs)]
        self.workers = [context.Process(target=work, args=(p, *arguments), daemon=True) for p in places]
        for worker in self.workers:
            worker.start()

    def run(self, tasks: list[Task]) -> list[dict[str, Any]]:
        """The rows of these tasks; those done before are not repeated, those after the deadline not begun."""
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
                    raise SystemExit("a worker died") from None
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
            print(f"{len(waiting)} runs were not begun: the time is up", flush=True)
        return [row for row in self.rows if row["name"] in names]


def choose(pool: Pool, parent: float) -> dict[str, Any]:
    """The best settings: alone, or all that help together."""

    def gaps(*settings: dict[str, Any]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for row in pool.run(sweep(*settings)):
            found.setdefault(json.dumps(row["settings"]), []).append(row["nats"] - parent)
        for key, each in sorted(found.items(), key=lambda item: sum(item[1])):
            print(f"{[round(gap, 4) for gap in each]} {key}", flush=True)
        return {key: sum(each) / len(each) for key, each in found.items() if len(each) == len(SWEPT)}

    alone = gaps(*SWEEP)
    first = alone.pop(json.dumps(BASE), float("inf"))
    together: dict[str, Any] = {}
    for key in sorted(alone, key=lambda key: -alone[key]):  # of two that set the same, the better
        if alone[key] < first - WORTH:
            together |= {name: value for name, value in json.loads(key).items() if BASE.get(name) != value}
    best = {**alone, json.dumps(BASE): first, **(gaps(together) if len(together) > 1 else {})}
    return json.loads(min(best, key=lambda key: best[key]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true", help="try settings first, and use the best")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all runs of distill")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after this long")
    parser.add_argument("--scale", type=float, default=1.0, help="share of every budget, to try the benchmark out")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    began = time.time()
    home = options.out
    (home / "models").mkdir(parents=True, exist_ok=True)
    device = options.device or ("cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    chosen = {key: json.loads(value) for key, _, value in (text.partition("=") for text in options.set)}
    if (home / "chosen.json").exists():
        chosen = json.loads((home / "chosen.json").read_text()) | chosen
    pool = Pool(home, options.jobs, options.scale, chosen, device)
    planned = [t for t in (*(sweep({}) if options.sweep else ()), *grid()) if options.only in t.name]
    starts = list(dict.fromkeys((task.target, task.method) for task in planned))
    read_text(home, max(task.percent for task in planned), options.scale)
    print(f"{time.time() - began:.0f} s: text is read", flush=True)
    parent = pool.run([Task("MHA", "parent", "parent")])[0]["nats"]
    ready = len(pool.run([Task(*start, "convert") for start in starts]))
    refitted = {(t.target, t.method) for t in planned if t.recipe == "two-stage"}
    ready += len(pool.run([Task(*start, "layerwise") for start in starts if start in refitted]))
    if ready < len(starts) + len(refitted):
        raise SystemExit("not every start was made: see above, mend it and run the same command again")
    print(f"{time.time() - began:.0f} s: converted and refitted", flush=True)
    pool.deadline = began + options.seconds
    if options.sweep and not chosen:
        chosen = choose(pool, parent)
        (home / "chosen.json").write_text(json.dumps(chosen))
        print(f"{time.time() - began:.0f} s: chose {chosen}", flush=True)
    runs = [task for task in grid() if options.only in task.name]
    if options.sweep:
        runs = [Task(t.target, t.method, t.recipe, t.percent, t.seed, _for(t, chosen)) for t in runs]
    pool.run(runs)
    for worker in pool.workers:
        worker.terminate()
    write(home, pool.rows, parent, HEADLINES)
    print(f"{time.time() - began:.0f} s in all", flush=True)


def _for(task: Task, chosen: dict[str, Any]) -> dict[str, Any]:
    """What a sweep chose, for one run: its batch belongs to its budget, its loss to distillation."""
    kept = dict(chosen)
    if "batch_tokens" in kept:
        kept["batch_tokens"] = batch_tokens(task.percent) * kept["batch_tokens"] // batch_tokens(PERCENT)
    if task.recipe == "paper":
        kept = {key: value for key, value in kept.items() if key not in LOSSES}
    return kept


if __name__ == "__main__":
    main()
