"""Check compiled decode kernels against their budgets of registers, spills, shared memory and instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest


class Budget(NamedTuple):
    """The most that a kernel may use. Less is an improvement: tighten the line.

    Attributes:
        registers: of each thread.
        stack: bytes of spilled registers of each thread.
        shared: bytes of shared memory of a program.
        unit: the tensor-core instruction, "wgmma" on Hopper and "mma" elsewhere.
        instructions: the exact number of these in the code.
    """

    registers: int
    stack: int
    shared: int
    unit: str
    instructions: int


def compile_shapes(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the resources of kernels by the names of `compile_kernels.SHAPES`; skip without Triton and Gluon."""
    pytest.importorskip("triton")
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        pytest.skip("this Triton has no Gluon")
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), *names]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def check_budget(report: dict[str, int], budget: Budget) -> None:
    assert report["registers"] <= budget.registers
    assert report["stack"] <= budget.stack
    assert report["shared"] <= budget.shared
    # All products must be on the tensor cores, and no more of them than the tiles require.
    assert report[budget.unit] == budget.instructions
