"""The campaign of hostile files: the sum over its workers, and a worker that died."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from typing import Any

import pytest

from tests.hostile import long_run


def _account(**changed: Any) -> dict[str, Any]:
    return {
        "inputs": 3,
        "escapes": 0,
        "cpu_minutes": 0.5,
        "first_escapes": [],
        "tried": {"report": 1, "index": 2},
        "kinds": {"report: done": 1, "index: refused": 2},
        "slowest_cpu_seconds": 0.1,
        "slowest": "--only 1",
        "memory_grown_bytes": 10,
        "finished": True,
    } | changed


def test_the_counts_of_all_workers_are_summed() -> None:
    escape = {"repeat": "--only 9", "escapes": ["overtime"], "message": ""}
    slow = _account(slowest_cpu_seconds=2.0, slowest="--only 9", escapes=1, first_escapes=[escape])
    whole = long_run.total([_account(tried={"report": 5}), slow])
    assert whole["inputs"] == 6 and whole["tried"] == {"index": 2, "report": 6}
    assert whole["kinds"] == {"index: refused": 4, "report: done": 2}
    assert whole["escapes"] == 1 and whole["first_escapes"] == [escape] and whole["slowest"] == "--only 9"
    assert whole["finished"] and whole["cpu_minutes"] == 1.0


def test_a_worker_that_died_is_an_escape_with_its_last_number() -> None:
    given = Namespace(seed=7, target="index", inputs=20)
    account = long_run.died({}, given, -9, "41")
    whole = long_run.total([_account(), account])
    assert whole["escapes"] == 1 and not whole["finished"] and whole["inputs"] == 3
    assert whole["first_escapes"][0]["repeat"] == "--seed 7 --only 41 --target 'index' --inputs 1"


@pytest.mark.full
def test_workers_try_the_same_inputs_as_one_process() -> None:
    accounts = []
    for workers in ("1", "2"):
        command = [sys.executable, long_run.__file__, "--inputs", "5", "--target", "recipe YAML", "--seed", "3"]
        done = subprocess.run([*command, "--workers", workers], capture_output=True, text=True, check=True)
        accounts.append(json.loads(done.stdout.splitlines()[-1]))
    alone, shared = accounts
    assert alone["kinds"] == shared["kinds"] and shared["tried"] == {"recipe YAML": 5}
