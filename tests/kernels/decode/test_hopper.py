"""The compiled kernel for Hopper keeps its budget of registers, spills, shared memory and instructions."""

from __future__ import annotations

import pytest

from tests.kernels.decode.budgets import Budget, check_budget, compile_shapes

BUDGETS = {
    "sm_90 MLA 32 heads 512+64": Budget(255, 0, 189000, "wgmma", 68),
    "sm_90 MLA 28 heads 448+64, pages": Budget(255, 0, 168500, "wgmma", 60),
    "sm_90 MLA 9 heads 192+64": Budget(255, 0, 143700, "wgmma", 56),
    "sm_90 MLA 32 heads 128+64": Budget(255, 0, 168600, "wgmma", 40),
    "sm_90 MLA 12 heads 160+64": Budget(255, 0, 143700, "wgmma", 56),
    "sm_90 MLA 6 heads 96+32, pages": Budget(128, 0, 65300, "wgmma", 18),
    "sm_90 MLA 32 heads 208+48": Budget(255, 16, 183900, "wgmma", 70),
    "sm_90 MLA 64 heads 208+48": Budget(168, 56, 212100, "wgmma", 140),
    "sm_90 MLA 128 heads 256+64, pages": Budget(168, 88, 207100, "wgmma", 56),
    "sm_90 MLA 128 heads 512+64": Budget(168, 32, 222800, "wgmma", 88),
    "sm_90 MLA 40 heads 320+64, pages": Budget(168, 88, 198700, "wgmma", 72),
    "sm_90 MLA 100 heads 448+48": Budget(168, 128, 208600, "wgmma", 86),
    "sm_90 MLA 32 heads 512+64, FP8": Budget(168, 40, 216300, "wgmma", 52),
    "sm_90 MLA 14 heads 256+64, FP8, pages": Budget(128, 16, 90300, "wgmma", 28),
    "sm_90 MLA 32 heads 384+32, FP8": Budget(168, 48, 216700, "wgmma", 76),
    "sm_90 MLA 32 heads 256+64, FP8": Budget(168, 32, 185700, "wgmma", 56),
    "sm_90 MLA 32 heads 512+96, FP8": Budget(168, 288, 143100, "wgmma", 108),
    "sm_90 MLA 9 heads 128+64, FP8": Budget(168, 8, 145700, "wgmma", 32),
    "sm_90 GQA groups of 7 x64": Budget(128, 0, 51500, "wgmma", 8),
    "sm_90 GQA groups of 4 x128, pages": Budget(128, 0, 101600, "wgmma", 16),
}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, int]]:
    return compile_shapes(BUDGETS)


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(reports: dict[str, dict[str, int]], name: str) -> None:
    assert reports[name]["hopper"]
    check_budget(reports[name], BUDGETS[name])
