"""What `headwise eval` takes beside lm-eval on the same tasks, in the same run.

    python benchmarks/evaluation.py CHILD BASELINE --tasks headwise_cloze_code,headwise_cloze_prose [--limit 50]

lm-eval by itself loads and evaluates both models and saves results and samples; headwise does that too, compares,
judges and writes a report; then once more with the parent's results kept. The order alternates over the rounds and
the figures are medians. Seconds of processor time stand beside those of the clock, because the former do not depend
on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import headwise
from headwise.eval.tasks.harness import OWN_TASKS, silenced

BOUND = 0.10


def lm_eval_alone(models: list[str], tasks: list[str], include: list[str], limit: float | None, out: Path) -> None:
    """Both models through lm-eval's own Python interface, as its command would."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    for model in models:
        with silenced():
            tracker = EvaluationTracker(output_path=str(out))
            manager = TaskManager(include_path=[OWN_TASKS, *include], include_defaults=not include)
            found = lm_eval.simple_evaluate(
                "hf",
                model_args={"pretrained": model, "dtype": "float32"},
                tasks=tasks,
                task_manager=manager,
                batch_size=16,
                device="cpu",
                limit=limit,
                evaluation_tracker=tracker,
            )
            samples = found.pop("samples")
            tracker.save_results_aggregated(results=found, samples=samples)
            for task, logged in samples.items():
                tracker.save_results_samples(task_name=task, samples=logged)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("child")
    parser.add_argument("baseline")
    parser.add_argument("--tasks", default="headwise_cloze_code,headwise_cloze_prose")
    parser.add_argument("--include-path", action="append", default=[])
    parser.add_argument("--limit", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tasks, include = options.tasks.split(","), options.include_path or [str(OWN_TASKS)]
    runs: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HEADWISE_CACHE"] = f"{scratch}/cache"

        def ours(cache: bool, limit: float | None = options.limit) -> None:
            headwise.evaluate_model(
                options.child, options.baseline, tasks=tasks, include_path=include, limit=limit,
                report=f"{scratch}/report", force=True, cache=cache, device="cpu", dtype="float32", batch_size=16,
            )  # fmt: skip

        def theirs(limit: float | None = options.limit) -> None:
            lm_eval_alone([options.baseline, options.child], tasks, include, limit, Path(scratch, "logs"))

        # The first pass of all imports modules and fills the file system's cache.
        theirs(limit=2)
        ours(False, limit=2)
        for number in range(options.rounds):
            both = {"lm-eval": theirs, "headwise": lambda: ours(False)}
            for name in list(both)[:: 1 if number % 2 == 0 else -1]:
                runs.setdefault(name, []).append(timed(both[name]))
        # The first of these finds no parent and keeps it.
        runs["headwise, parent kept"] = [timed(lambda: ours(True)) for _ in range(options.rounds + 1)][1:]
    base = [statistics.median(values) for values in zip(*runs["lm-eval"], strict=True)]
    print(f"{'':24} {'seconds':>8} {'x lm-eval':>10} {'CPU seconds':>12} {'x lm-eval':>10}")
    for name, times in runs.items():
        clock, processor = (statistics.median(values) for values in zip(*times, strict=True))
        print(f"{name:24} {clock:8.1f} {clock / base[0]:10.3f} {processor:12.1f} {processor / base[1]:10.3f}")
    added = statistics.median(values[1] for values in runs["headwise"]) / base[1] - 1
    print(f"headwise adds {added:.1%} of processor time (bound: {BOUND:.0%})")


if __name__ == "__main__":
    main()
