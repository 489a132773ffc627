"""Fuzz every kind of file: `python tests/hostile/long_run.py --inputs 20000` of each, or `--minutes 60` of all.

Every input is made from the seed and its number alone. `--workers N` shares the numbers among N processes, so the
inputs are the same for every N. The last line of the output is the account, one JSON object. The exit code is 1 if
anything escaped: a traceback, "This is a bug", a write outside OUT, code that ran, or a worker that died. The
account has the options that repeat each escape. Files are in memory where the system has a place for that.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # many processes would share a GPU

HANG = 300
SNAPSHOT = 500
# More numbers than a worker can try in any time.
APART = 10**9
SUMMED = ("inputs", "escapes", "cpu_minutes")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Fuzz for a time, or a number of inputs of each target, in this process; return the account."""
    from tests.hostile.guard import peak
    from tests.hostile.targets import TARGETS, Prey

    names = [given.target] if given.target else list(TARGETS)
    weights = [TARGETS[name][1] for name in names]
    began, only = time.monotonic(), given.only
    tried: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    account: dict[str, Any] = {"seed": given.seed, "escapes": 0, "first_escapes": [], "slowest_cpu_seconds": 0.0}
    with tempfile.TemporaryDirectory(prefix="headwise-hostile-", dir=_place()) as home:
        prey = Prey(Path(home))
        resting = peak()
        # Address space is a blunt bound; the guard watches resident memory of every input.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), resource.RLIM_INFINITY))
        start = given.start if only is None else only
        end = start + given.inputs * len(names) if given.inputs is not None and only is None else sys.maxsize
        number = start
        while number < end and (given.minutes is None or time.monotonic() - began < 60 * given.minutes):
            faulthandler.dump_traceback_later(HANG, exit=True)
            if given.at:
                given.at.write_text(str(number))
            # By number, every target gets the same share, and the cheap ones do not crowd out the others.
            by_weight = Random(f"{given.seed}/{number}/target").choices(names, weights)[0]
            name = by_weight if given.inputs is None else names[number % len(names)]
            before = time.process_time()
            outcome = TARGETS[name][0](prey, Random(f"{given.seed}/{number}"))
            took = time.process_time() - before
            if took > account["slowest_cpu_seconds"]:
                account |= {"slowest_cpu_seconds": round(took, 3), "slowest": _repeat(given.seed, number, name)}
            tried[name] += 1
            kinds[f"{name}: {outcome.kind}"] += 1
            number += 1
            if outcome.escapes:
                escape = {
                    "repeat": _repeat(given.seed, number - 1, name),
                    "escapes": outcome.escapes,
                    "message": outcome.message[:600],
                }
                account["escapes"] += 1
                account["first_escapes"] = [*account["first_escapes"], escape][:200]
                print(json.dumps(escape), file=sys.stderr, flush=True)
            account |= {"inputs": sum(tried.values()), "tried": dict(tried), "kinds": dict(kinds)}
            if only is not None:
                print(name, outcome.kind, outcome.escapes, outcome.message, sep="\n")
                break
            if given.out and number % SNAPSHOT == 0:
                given.out.write_text(json.dumps(account))
        faulthandler.cancel_dump_traceback_later()
    return account | {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "cpu_minutes": round(time.process_time() / 60, 2),
        "memory_grown_bytes": peak() - resting,
        "next": number,
        "finished": True,
    }


def share(given: argparse.Namespace) -> dict[str, Any]:
    """Run `given.workers` processes on numbers of their own; return the sum of their accounts."""
    from tests.hostile.targets import TARGETS

    count, width = given.workers, 1 if given.target else len(TARGETS)
    start, began = given.start, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headwise-workers-") as folder:
        running = []
        for worker in range(count):
            out, at = Path(folder, f"{worker}.json"), Path(folder, f"{worker}.at")
            command = [sys.executable, __file__, "--seed", str(given.seed), "--start", str(start)]
            command += ["--out", str(out), "--at", str(at)]
            if given.target:
                command += ["--target", given.target]
            if given.minutes is not None:
                command += ["--minutes", str(given.minutes)]
            if given.inputs is not None:
                inputs = given.inputs // count + (worker < given.inputs % count)
                command += ["--inputs", str(inputs)]
            running.append((subprocess.Popen(command, stdout=subprocess.DEVNULL), out, at))
            start += APART * width if given.inputs is None else inputs * width
        accounts = []
        for process, out, at in running:
            process.wait()
            account = json.loads(out.read_text()) if out.exists() else {}
            if not account.get("finished"):
                last = at.read_text() if at.exists() else "none"
                account = died(account, given, process.returncode, last)
                print(json.dumps(account["first_escapes"][-1]), file=sys.stderr, flush=True)
            accounts.append(account)
    return total(accounts) | {"seed": given.seed, "minutes": round((time.monotonic() - began) / 60, 2)}


def died(account: dict[str, Any], given: argparse.Namespace, code: int, number: str) -> dict[str, Any]:
    """Add an escape to the last account of a worker that did not finish."""
    repeat = f"--seed {given.seed} --only {number}" + (f" --target {given.target!r}" if given.target else "")
    if given.inputs is not None:
        repeat += " --inputs 1"
    escape = {"repeat": repeat, "escapes": [f"the worker died with exit code {code}"], "message": ""}
    first = [*account.get("first_escapes", ()), escape]
    return account | {"escapes": account.get("escapes", 0) + 1, "first_escapes": first}


def total(accounts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum the accounts of the workers."""
    slowest = max(accounts, key=lambda account: float(account.get("slowest_cpu_seconds", 0)))
    whole: dict[str, Any] = {
        "workers": len(accounts),
        "slowest_cpu_seconds": slowest.get("slowest_cpu_seconds", 0.0),
        "slowest": slowest.get("slowest"),
        "memory_grown_bytes": max(account.get("memory_grown_bytes", 0) for account in accounts),
        "finished": all(account.get("finished") for account in accounts),
        "first_escapes": [escape for account in accounts for escape in account.get("first_escapes", ())],
    }
    for name in SUMMED:
        whole[name] = round(sum(account.get(name, 0) for account in accounts), 2)
    for name in ("tried", "kinds"):
        counts = sum((Counter(account.get(name, {})) for account in accounts), Counter())
        whole[name] = dict(sorted(counts.items()))
    return whole


def _place() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _repeat(seed: int, number: int, target: str) -> str:
    return f"--seed {seed} --only {number} --target {target!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="end after this time")
    parser.add_argument("--inputs", type=int, help="end after this number of inputs of each target")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input, to repeat it")
    parser.add_argument("--target")
    parser.add_argument("--out", type=Path, help="file for the account, also written on the way")
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.minutes is None and given.inputs is None:
        given.minutes = 60.0
    account = share(given) if given.workers > 1 and given.only is None else run(given)
    if given.out:
        given.out.write_text(json.dumps(account))
    if given.only is None:
        print(json.dumps(account), flush=True)
    sys.exit(1 if account["escapes"] else 0)


if __name__ == "__main__":
    main()
