"""Fuzz every kind of file: `python tests/hostile/long_run.py --inputs 20000` of each, or `--minutes 60` of all.

Every input is made from its number alone; `--only NUMBER`, with the same other options, makes it again and shows
what happened. The exit code is 1 if anything escaped: a traceback, "This is a bug", a write outside OUT, or code
that ran. One process, files in memory where the system has a place for that.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"

HANG = 300


def run(
    minutes: float | None,
    inputs: int | None,
    start: int,
    seed: int,
    out: Path | None,
    only: int | None,
    target: str | None,
) -> int:
    """Fuzz for a time, or a number of inputs of each target; print the account as JSON; 1 if something escaped."""
    from tests.hostile.guard import peak
    from tests.hostile.targets import TARGETS, Prey

    names = [target] if target else list(TARGETS)
    weights = [TARGETS[name][1] for name in names]
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="headwise-hostile-", dir=place) as home:
        prey = Prey(Path(home))
        resting = peak()
        # Address space is a blunt bound; the guard watches resident memory of every input.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30), resource.RLIM_INFINITY))
        tried: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        escapes: list[dict[str, object]] = []
        slowest = (0.0, -1)
        began = time.monotonic()
        number = start if only is None else only
        end = start + inputs * len(names) if inputs else sys.maxsize
        while number < end and (minutes is None or time.monotonic() - began < 60 * minutes):
            faulthandler.dump_traceback_later(HANG, exit=True)
            random = Random(f"{seed}/{number}")
            # By number, every target gets the same share, and the cheap ones do not crowd out the others.
            name = names[number % len(names)] if inputs else random.choices(names, weights)[0]
            at = time.process_time()
            outcome = TARGETS[name][0](prey, random)
            took = time.process_time() - at
            slowest = max(slowest, (took, number))
            tried[name] += 1
            kinds[f"{name}: {outcome.kind}"] += 1
            if outcome.escapes:
                escapes.append(
                    {"number": number, "target": name, "escapes": outcome.escapes, "message": outcome.message[:600]}
                )
                print(json.dumps(escapes[-1]), file=sys.stderr, flush=True)
            if only is not None:
                print(name, outcome.kind, outcome.escapes, outcome.message, sep="\n")
                break
            number += 1
            if out and number % 500 == 0:
                out.write_text(
                    json.dumps(_account(began, tried, kinds, escapes, slowest, resting, number), indent=1)
                )
        faulthandler.cancel_dump_traceback_later()
        account = _account(began, tried, kinds, escapes, slowest, resting, number)
        if out:
            out.write_text(json.dumps(account, indent=1))
        if only is None:
            print(json.dumps(account, indent=1))
    return 1 if escapes else 0


def _account(began, tried, kinds, escapes, slowest, resting, number) -> dict[str, object]:  # type: ignore[no-untyped-def]
    from tests.hostile.guard import peak

    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "cpu_minutes": round(time.process_time() / 60, 2),
        "inputs": sum(tried.values()),
        "tried": dict(sorted(tried.items())),
        "kinds": dict(sorted(kinds.items())),
        "escapes": len(escapes),
        "first_escapes": escapes[:200],
        "slowest_cpu_seconds": round(slowest[0], 3),
        "slowest_number": slowest[1],
        "memory_grown_bytes": peak() - resting,
        "next": number,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="end after this time")
    parser.add_argument("--inputs", type=int, help="end after this number of inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--target")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.minutes is None and given.inputs is None:
        given.minutes = 60.0
    sys.exit(run(given.minutes, given.inputs, given.start, given.seed, given.out, given.only, given.target))


if __name__ == "__main__":
    main()
