"""The compiled portable kernel keeps its budget of registers, spills, shared memory and instructions."""

from __future__ import annotations

import pytest

from tests.kernels.decode.budgets import Budget, check_budget, compile_shapes

BUDGETS = {
    "sm_89 MLA 14 heads 256+32, pages": Budget(154, 0, 31900, "mma", 52),
    "sm_89 MLA 14 heads 256+32, FP8": Budget(168, 0, 20800, "mma", 52),
    "sm_80 MLA 14 heads 512+64": Budget(176, 0, 63500, "mma", 88),
    "sm_80 GQA groups of 5 x128, pages": Budget(168, 0, 39000, "mma", 32),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, int]]:
    return compile_shapes(BUDGETS)


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(reports: dict[str, dict[str, int]], name: str) -> None:
    assert not reports[name]["hopper"]
    check_budget(reports[name], BUDGETS[name])
