"""Compare `headwise convert` with `cp -r` of the same folder, in time and in peak memory.

    python benchmarks/convert_speed.py [MODEL] [--groups 8] [--rounds 3]

Without MODEL it makes the 13.5 GB checkpoint of make_checkpoint.py first. Both are timed until their bytes are
on the disk (`sync`), in turn, after one another's output is deleted. The figures are medians over the rounds, and
the load average after each run tells how busy the machine was with other work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from make_checkpoint import make

METHODS = {"mean": 1.5, "optimal": 6.0}
MAX_MEMORY = 3e9


def run(command: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds until the output is on the disk, those a processor worked on it, and peak memory in bytes."""
    os.sync()
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    shutil.rmtree(out)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(model: Path, scratch: Path, groups: int, rounds: int) -> bool:
    """Print a table; whether every figure is within its bound."""
    out = scratch / "out"
    commands = {"cp -r": ["cp", "-r", str(model), str(out)]}
    for method in METHODS:
        options = f"--to gqa --groups {groups} --method {method} --calibrate none --refit off --no-verify -q"
        convert = [str(Path(sys.executable).with_name("headwise")), "convert", str(model), str(out)]
        commands[method] = convert + options.split()
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            results[name].append(run(command, out))
            print(f"{name}: {results[name][-1][0]:.1f} s, load average {os.getloadavg()[0]:.1f}", flush=True)
    copy = median(seconds for seconds, _, _ in results["cp -r"])
    good = True
    print(f"{'':10} {'seconds':>8} {'x cp -r':>8} {'bound':>6} {'CPU s':>7} {'peak memory':>12}")
    for name, runs in results.items():
        seconds, work = median(s for s, _, _ in runs), median(w for _, w, _ in runs)
        memory = max(m for _, _, m in runs)
        bound = METHODS.get(name)
        good = good and (bound is None or (seconds <= bound * copy and memory <= MAX_MEMORY))
        # A child's figure starts at this process's own size, which is more than cp ever has.
        peak = f"{memory / 1e9:9.2f} GB" if bound else ""
        print(f"{name:10} {seconds:8.1f} {seconds / copy:8.2f} {bound or '':>6} {work:7.1f} {peak}")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headwise-bench-") as scratch:
        folder = arguments.model or make(Path(scratch) / "model")
        sys.exit(0 if compare(folder, Path(scratch), arguments.groups, arguments.rounds) else 1)
