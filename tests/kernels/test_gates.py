"""The compiled kernels keep to their budget of registers, spills, shared memory and matrix instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if importlib.util.find_spec("triton.experimental.gluon") is None:
    pytest.skip("this Triton has no Gluon", allow_module_level=True)

# One line a shape of gates.py: most registers, most bytes of spills, most shared memory, tensor-core instructions
# (wgmma on Hopper, mma.sync elsewhere). Fewer are an improvement: tighten the line.
BUDGETS = {
    "sm_90 MLA 32 heads 512+64": (255, 0, 189000, "wgmma", 68),
    "sm_90 MLA 28 heads 448+64, pages": (255, 16, 168500, "wgmma", 60),
    "sm_90 MLA 9 heads 192+64": (255, 0, 143700, "wgmma", 56),
    "sm_90 MLA 32 heads 128+64": (255, 0, 168600, "wgmma", 40),
    "sm_90 MLA 128 heads 512+64": (168, 88, 230500, "wgmma", 136),
    "sm_90 GQA groups of 7 x64": (128, 0, 51400, "wgmma", 8),
    "sm_90 GQA groups of 4 x128, pages": (128, 0, 101600, "wgmma", 16),
    "sm_90 MLA 32 heads 208+48, portable": (255, 0, 88100, "wgmma", 28),
    "sm_89 MLA 14 heads 256+32, pages": (140, 0, 31900, "mma", 52),
    "sm_80 MLA 14 heads 512+64": (176, 0, 63500, "mma", 88),
    "sm_80 GQA groups of 5 x128, pages": (168, 0, 39000, "mma", 32),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, int]]:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, str(Path(__file__).with_name("gates.py"))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(BUDGETS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(reports: dict[str, dict[str, int]], name: str) -> None:
    registers, stack, shared, unit, instructions = BUDGETS[name]
    report = reports[name]
    assert report["registers"] <= registers
    assert report["stack"] <= stack
    assert report["shared"] <= shared
    # The products must be on the tensor cores, all of them, and no more often than the tiles ask for.
    assert report[unit] == instructions
