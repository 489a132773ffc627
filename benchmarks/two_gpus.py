"""Two GPUs against one: conversion, training and evaluation, in one run of at most `--seconds`.

    python -m benchmarks.two_gpus WORK                              on a machine with two GPUs and no network
    python -m benchmarks.two_gpus WORK --device cpu --small         the same commands on a CPU, to try them
    python -m benchmarks.two_gpus WORK --conversion --layers 32     the conversion alone, of the whole 7B shape
    python -m benchmarks.two_gpus WORK --resume                     resuming alone, from two processes to one

Run it in the root of a clone. WORK needs 20 GB, and 30 GB for 32 layers. Every part runs in processes of its own,
with a limit of its own, and prints a line of JSON when it is done or has failed. A conversion prints each stage to
stderr when it begins, so that a run that was cut shows where its time went.

First come the parts that compare figures and time nothing. The 7B-shaped checkpoint is made; meanwhile a small
model is trained, resumed on another number of processes, and evaluated on one process and on two. Then conversion
and training are timed, one after the other, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
EMBEDDED = REPOSITORY / "headwise" / "demo" / "model"
FSDP2, DDP = (REPOSITORY / "headwise" / "recipes" / "accelerate" / f"{kind}.yaml" for kind in ("fsdp2", "ddp"))
# Without multicast over NVLink, which not every machine allows; nothing is downloaded.
SET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
PATHS = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = {**SET, **os.environ, "PYTHONPATH": PATHS, "PYTHONUNBUFFERED": "1"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
HEADWISE = [sys.executable, "-m", "headwise"]
# Seconds that a part may take, and more for every converted layer. The first three run at the same time.
LIMITS = {
    "checkpoint": (30, 10),
    "resume": (300, 0),
    "eval": (130, 0),
    "convert-1": (60, 12),
    "convert-2": (60, 12),
    "train-1": (80, 0),
    "train-2": (130, 0),
}
RESUME = "resume from 2 to 1 processes"
# Seconds of the whole run, and more for every layer.
WHOLE = (200, 34)
RECIPE = """
about: Held-out loss by position, and two tasks where lm-eval is installed.
perplexity: {length: 512, blocks: 48, stretches: 8}
"""
TASKS = "tasks: [headwise_cloze_code, headwise_cloze_prose]\nlimit: 16\n"


class Failed(Exception):
    """A command failed or took too long."""


class Run:
    """The options, the clock, and the commands of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.cpu, self.small = options.device == "cpu", options.small
        self.layers, self.groups = (5, 2) if self.small else (options.layers, 8)
        self.conversion: bool = options.conversion
        self.end = time.monotonic() + (options.seconds or WHOLE[0] + WHOLE[1] * self.layers)
        self.limits: dict[str, float] = {}

    @property
    def parent(self) -> Path:
        """The model that is converted."""
        return EMBEDDED if self.small else self.work / "parent"

    def command(self, part: str, words: Sequence[Any], *, stop: Callable[[], bool] | None = None) -> str:
        """Run a command within the limit of its part, and return what it printed.

        Args:
            part: names the log and the limit.
            words: of the command.
            stop: ends the command with SIGTERM as soon as it returns True.
        """
        fixed, for_a_layer = LIMITS[part]
        allowed = (fixed + for_a_layer * self.layers) * (20 if self.cpu else 1)
        limit = min(self.limits.setdefault(part, time.monotonic() + allowed), self.end)
        log = self.work / f"{part}-{int(time.monotonic() * 1000)}.log"
        with log.open("w+") as errors, (log.with_suffix(".out")).open("w+") as output:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=REPOSITORY,
                env=ENVIRONMENT,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
            stopped = False
            while process.poll() is None and time.monotonic() < limit:
                if stop is not None and not stopped and stop():
                    process.send_signal(signal.SIGTERM)
                    stopped = True
                time.sleep(0.02)
            late = process.poll() is None
            if late:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
                process.wait()
            output.seek(0)
            errors.seek(0)
            printed, tail = output.read(), errors.read()[-1500:]
        if late or (process.returncode and not stopped):
            reason = "too late" if late else f"exit code {process.returncode}"
            raise Failed(f"{reason}: {' '.join(map(str, words[1:6]))}: {tail} {printed[-2000:]}")
        return printed

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a part, and print its line."""
        start = time.monotonic()
        try:
            if start >= self.end:
                raise Failed("no time left")
            result = work()
        except Exception as error:  # the other parts are measured all the same
            result = {"failed": str(error) or repr(error)}
        show(name, {**result, "seconds of the part": round(time.monotonic() - start, 1)})
        return result


def show(part: str, figures: dict[str, Any]) -> None:
    """Print one line."""
    print(json.dumps({"part": part, **figures}), flush=True)


def lines(output: str) -> list[dict[str, Any]]:
    """The lines of JSON in an output."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


# Conversion


class Watch(threading.Thread):
    """Sample this process and a device five times a second: memory of the host without mapped files, busy share."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True)
        self.device, self.host = device.split(",")[0], 0
        self.shares: list[int] = []
        self.done = threading.Event()

    def run(self) -> None:
        import torch

        status = Path("/proc/self/status")
        counted = self.device.startswith("cuda")
        while not self.done.wait(0.2):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            own = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))  # in units of 1,024 bytes
            self.host = max(self.host, 1024 * own)
            if counted:
                try:
                    self.shares.append(torch.cuda.utilization(torch.device(self.device)))
                except Exception:  # the counters of the driver, or the package that reads them, may be missing
                    counted = False

    @property
    def busy(self) -> float | None:
        """Percent of the time in which the GPU worked; None: unknown."""
        return round(statistics.fmean(self.shares), 1) if self.shares else None


def convert_once(model: str, out: str, settings: dict[str, Any]) -> None:
    """Convert, and print seconds and memory by stage and the forecast; to stderr each stage when it begins.

    Processor seconds show what each process does where several share the processor.
    """
    import torch

    from headwise.convert.pipeline import convert_model
    from headwise.progress import Progress

    class Clock(Progress):
        def __init__(self) -> None:
            self.stages: dict[str, float] = {}
            self.processor: dict[str, float] = {}
            self.peaks: dict[str, float] = {}
            self.current, self.start = "Start", time.perf_counter()
            self.since, self.used = self.start, time.process_time()

        def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
            now, used = time.perf_counter(), time.process_time()
            self.stages[self.current] = self.stages.get(self.current, 0.0) + now - self.since
            self.processor[self.current] = self.processor.get(self.current, 0.0) + used - self.used
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 1e9
                self.peaks[self.current] = max(self.peaks.get(self.current, 0.0), round(peak, 2))
                torch.cuda.reset_peak_memory_stats()
            self.current, self.since, self.used = name, now, used
            print(f"{now - self.start:8.1f} s  {name or 'end'}", file=sys.stderr, flush=True)

        def finish(self) -> None:
            self.stage("")

    plan: Any = convert_model(model, out, dry_run=True, **settings)
    clock, watch = Clock(), Watch(settings["device"])
    watch.start()
    convert_model(model, out, progress=clock, **settings)
    watch.done.set()
    seconds = time.perf_counter() - clock.start
    host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    result = {"seconds": seconds, "stages": clock.stages, "forecast": plan.seconds}
    result |= {"GB of the GPU by stage": clock.peaks, "GB of the host": round(watch.host / 1e9, 2)}
    result |= {"GB of the host with mapped files": round(host, 2)}
    result |= {"busy share of the GPU, percent": watch.busy}
    # Of the first process, its threads included, and of the processes of the other devices.
    further = resource.getrusage(resource.RUSAGE_CHILDREN)
    result |= {"processor seconds": clock.processor, "of other processes": further.ru_utime + further.ru_stime}
    print(json.dumps(result))


def convert(run: Run, count: int) -> dict[str, Any]:
    """Convert on a number of devices, in a process of its own."""
    device = ",".join("cpu" if run.cpu else f"cuda:{i}" for i in range(count))
    out = run.work / f"on-{count}" / "converted"  # the record holds the last part
    words = [sys.executable, "-m", "benchmarks.two_gpus", run.work, "--convert", run.parent, out]
    output = run.command(f"convert-{count}", [*words, "--groups", run.groups, "--device", device])
    (out / "headwise.json").rename(run.work / f"record-{count}.json")
    shutil.rmtree(out)
    return {"layers": run.layers, "device": device, **lines(output)[-1]}


def compare_records(run: Run) -> dict[str, Any]:
    """Compare what both conversions recorded: the hash of every tensor and of every file, and every error."""
    one, two = (json.loads((run.work / f"record-{count}.json").read_text()) for count in (1, 2))
    apart = [name for name, digest in one["sha256"].items() if two["sha256"].get(name) != digest]
    fields = [name for name in one if one[name] != two.get(name)]
    errors = [dict(numbers(record["layers"])) for record in (one, two)]
    far: dict[str, float] = {}
    for name, value in errors[0].items():
        _, _, figure = name.strip("/").partition("/")  # of every layer
        other = errors[1].get(name)
        apart_by = abs(value / other - 1) if other else float(value != other)
        far[figure] = max(far.get(figure, 0.0), apart_by)
    return {
        "bytes equal": not fields,
        "tensors": len(one["sha256"]),
        "tensors that differ": apart,
        "fields": fields,
        "largest relative difference of the layers' figures": far,
    }


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested data with their paths."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, f"{name}/{key}")
    elif isinstance(value, float | int):
        yield name, float(value)


# Training


def train(run: Run, count: int) -> dict[str, Any]:
    """Time an MLA student beside its parent: headwise and a bare loop, on one device or under FSDP2 on two."""
    shape = ["--shape", "tiny", "--steps", 2] if run.small else ["--shape", "7b", "--steps", 5, "--batch", 8192]
    words = ["-m", "benchmarks.training", *shape]
    if count == 1:
        # The bare loop on one GPU was measured before; its time is better spent on two.
        launch = [sys.executable, *words, "--no-bare"]
    else:
        words += ["--shards-on-cpu"] if run.cpu else []
        launch = [*LAUNCH, "--config_file", FSDP2, "--num_processes", count, "--main_process_port", 0, *words]
    found = lines(run.command(f"train-{count}", launch))
    loops = {line["loop"]: line for line in found if "loop" in line}
    last = found[-1]
    result: dict[str, Any] = {"loops": loops, "forecast": last.get("forecast"), "device": last.get("device")}
    for line in loops.values():
        line["steps per second"] = round(1 / line["seconds"], 4)
    if "bare" in loops:
        result["ours / bare"] = round(loops["bare"]["seconds"] / loops["ours"]["seconds"], 3)
    if result["forecast"]:
        result["forecast / peak"] = round(result["forecast"] / loops["ours"]["peak"], 3)
    return result


def curve(folder: Path) -> list[tuple[str, str, float]]:
    """Every loss in the curve of a training."""
    with (folder / "uptraining.csv").open() as file:
        return [
            (row["step"], name, float(row[name]))
            for row in csv.DictReader(file)
            for name in ("loss", "heldout")
            if row[name]
        ]


def resume(run: Run) -> dict[str, Any]:
    """Train on one device; then under FSDP2 on two, stopped at a checkpoint and finished on one."""
    child, batch, steps = small_child(run), *((1024, 8) if run.small else (16384, 120))
    settings = {
        "train.tokens": steps * batch,
        "train.batch_tokens": batch,
        "train.micro_batch_tokens": batch // 2 if batch // 2 >= 1024 else None,
        "data.length": 1024 if batch > 1024 else 256,
        "train.learning_rate": 2e-4,
        "train.precision": "float32",
        "train.log_every": 1,
        "train.evaluate_every": steps // 4,
        "train.save_every": 4 if run.small else 5,
        "data.heldout_blocks": 8,
    }
    chosen = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    options = [word for setting in chosen for word in ("--set", setting)]

    def words(out: Path, *more: Any) -> list[Any]:
        start = [*HEADWISE, "uptrain", child, out, "--teacher", EMBEDDED, "--text", "builtin"]
        return [*start, *options, "--quiet", *more]

    one, two = run.work / "one", run.work / "two"
    run.command("resume", words(one, "--launch", "single"))
    training = run.work / f".{two.name}.headwise-work" / "training"

    def checkpointed() -> bool:
        return any(path.name.startswith("checkpoint-") for path in training.glob("checkpoint-*"))

    sharded = words(two, "--launch", "fsdp2", "--processes", 2)
    if run.cpu:  # `--launch fsdp2` needs GPUs
        arguments = {"model": child, "out": two, "teacher": EMBEDDED, "settings": [*chosen, TEXT]}
        config = ["--config_file", FSDP2, "--num_processes", 2, "--main_process_port", 0]
        sharded = [*LAUNCH, *config, REPOSITORY / "tests/train/fsdp2_on_cpu.py", json.dumps(arguments, default=str)]
    run.command("resume", sharded, stop=checkpointed)
    stopped_at = sorted(path.name for path in training.glob("checkpoint-*"))
    if not stopped_at:
        raise Failed("the sharded run has no checkpoint")
    if two.exists():
        raise Failed("the sharded run was complete before it was stopped")
    run.command("resume", words(two, "--launch", "single", "--resume"))
    first, second = curve(one), curve(two)
    apart = [abs(a[2] / b[2] - 1) for a, b in zip(first, second, strict=True)]
    return {
        "stopped at": stopped_at,
        "same points": [point[:2] for point in first] == [point[:2] for point in second],
        "losses": len(first),
        "largest relative difference": max(apart),
        "last": [first[-1], second[-1]],
    }


TEXT = 'data.text={"builtin": 1}'


def small_child(run: Run) -> Path:
    """The embedded model with two KV heads."""
    child = run.work / "small"
    if not child.exists():
        kind = "--to gqa --groups 2 --method mean --calibrate none --refit off --device cpu --no-verify --quiet"
        run.command("resume", [*HEADWISE, "convert", EMBEDDED, child, *kind.split()])
    return child


# Evaluation


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluate the small child on one process and on two, and compare all figures."""
    recipe = run.work / "recipe.yaml"
    recipe.write_text(RECIPE + (TASKS if find_spec("lm_eval") else ""))
    results = []
    for count in (1, 2):
        words = ["eval", run.work / "small", "--baseline", EMBEDDED, "--recipe", recipe, "--no-cache", "--json"]
        words += ["--quiet", "--report", run.work / f"report-{count}", "--device", "cpu" if run.cpu else "cuda"]
        launch = [
            *LAUNCH,
            "--config_file",
            DDP,
            "--num_processes",
            count,
            "--main_process_port",
            0,
            "-m",
            "headwise",
        ]
        results.append(lines_of_object(run.command("eval", [*(launch if count > 1 else HEADWISE), *words])))
    values = [
        {
            (c["task"], c["metric"], role): c[role]["value"]
            for c in result["comparisons"]
            for role in ("child", "parent")
        }
        for result in results
    ]
    apart = [abs(values[0][key] - values[1][key]) for key in values[0]]
    return {
        "figures": len(apart),
        "largest difference": max(apart),
        "equal": values[0] == values[1] and results[0]["positions"] == results[1]["positions"],
        "tasks": find_spec("lm_eval") is not None,
        "seconds": [result["seconds"] for result in results],
    }


def lines_of_object(output: str) -> dict[str, Any]:
    """The one JSON object of a command under `--json`."""
    result: dict[str, Any] = json.loads(output)
    return result


def measure(run: Run) -> None:
    """Do all parts."""
    start = time.monotonic()

    def make() -> dict[str, Any]:
        if not run.small:
            script = REPOSITORY / "benchmarks" / "make_checkpoint.py"
            device = "cpu" if run.cpu else "cuda:0"
            run.command(
                "checkpoint", [sys.executable, script, run.parent, "--layers", run.layers, "--device", device]
            )
        return {"layers": run.layers}

    first: list[tuple[str, Callable[[], dict[str, Any]]]] = [("checkpoint", make)]
    if not run.conversion:
        small_child(run)
        first += [
            (RESUME, lambda: resume(run)),
            ("eval on 1 and 2 processes", lambda: evaluate(run)),
        ]
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(run.part, *each) for each in first]
        for future in made:
            future.result()
    conversions = [run.part(f"convert on {n}", lambda n=n: convert(run, n)) for n in (1, 2)]  # type: ignore[misc]
    if not any("failed" in result for result in conversions):
        one, two = conversions
        ratios = {
            "speed of 2 / 1": one["seconds"] / two["seconds"],
            "speed of 2 / 1, layers": one["stages"]["Converting"] / two["stages"]["Converting"],
        }
        show("convert", ratios | compare_records(run))
    if run.conversion:
        return
    trainings = [run.part(f"train on {n}", lambda n=n: train(run, n)) for n in (2, 1)]  # type: ignore[misc]
    if not any("failed" in result for result in trainings):
        two, one = (result["loops"]["ours"] for result in trainings)
        show(
            "train", {"speed of 2 / 1": one["seconds"] / two["seconds"], "peak of 2 / 1": two["peak"] / one["peak"]}
        )
    show("all", {"seconds": round(time.monotonic() - start, 1)})


def main() -> None:
    """Run the parts, or one conversion in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=8, help="of the 7B shape, for the conversion")
    parser.add_argument("--conversion", action="store_true", help="convert alone: no training and no evaluation")
    parser.add_argument("--resume", action="store_true", help="resume from two processes to one: nothing else")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--seconds", type=float, help="after which all is ended; default: by the layers")
    parser.add_argument("--convert", nargs=2, metavar=("MODEL", "OUT"), help="a conversion, as a part starts it")
    parser.add_argument("--groups", type=int, help="of `--convert`: GQA with so many KV heads")
    parser.add_argument("--more", type=json.loads, default={}, metavar="JSON", help="of `--convert`: more settings")
    parser.add_argument("--mla", nargs=2, type=int, metavar=("RANK", "ROPE_DIM"), help="of `--convert`: MLA")
    options = parser.parse_args()
    if options.convert:
        rank, rope_dim = options.mla or (None, None)
        mla = {"to": "mla", "rank": rank, "rope_dim": rope_dim}
        target = mla if options.mla else {"to": "gqa", "groups": options.groups}
        convert_once(*options.convert, {**target, "refit": "off", "device": options.device, **options.more})
        return
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    if options.resume:
        run.part(RESUME, lambda: resume(run))
    else:
        measure(run)


if __name__ == "__main__":
    main()
