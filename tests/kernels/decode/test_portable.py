"""The portable kernel keeps its compiled budget, and the merge of splits agrees with float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from headwise.kernels.decode import portable
from headwise.kernels.decode.tiling import choose_merge
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


DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "rows, width, num_splits", [(3, 512, 128), (5, 48, 3), (2, 144, 200), (7, 80, 2), (300, 448, 5)]
)
def test_the_merge_of_any_number_of_splits_and_any_width(rows, width, num_splits, device) -> None:
    generator = torch.Generator(device).manual_seed(rows)
    noise = dict(device=device, generator=generator)
    parts = torch.randn(num_splits, rows, width, **noise)
    # Splits without keys have zeros and -inf; so have all splits of the last row.
    part_lse = 20 * torch.randn(num_splits, rows, **noise)
    empty = torch.rand(num_splits, rows, **noise) < 0.3
    empty[:, -1] = True
    empty[0, 0] = False
    part_lse[empty], parts[empty] = -torch.inf, 0.0
    out = torch.full((rows, width), torch.nan, device=device)
    lse = torch.full((rows,), torch.nan, device=device)
    splits, columns = choose_merge(rows, width, num_splits, 132)
    portable.merge[(rows, -(-width // columns))](
        parts, part_lse, out, lse, num_splits, rows, width, SPLITS=splits, WIDTH=columns, EARLY=False
    )
    expected_lse = part_lse.double().logsumexp(0)
    weights = torch.where(empty, 0.0, (part_lse.double() - expected_lse).exp())
    torch.testing.assert_close(out.double(), (weights[..., None] * parts.double()).sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)
    assert lse[-1] == -torch.inf and (out[-1] == 0).all()
