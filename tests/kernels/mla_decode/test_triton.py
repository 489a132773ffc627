"""Decode on selected tokens: the reference and the kernel against dense attention with a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.kernels.mla_decode import mla_decode, reference

RANK, ROPE, HEADS, SCALE = 48, 16, 5, 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(lengths: list[int], starts: list[int], queries: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random inputs, NaN in every entry that no query sees, and selections with the visible tokens first."""
    generator = torch.Generator().manual_seed(sum(lengths))
    batch, capacity = len(lengths), max(lengths) + 3
    cache = torch.randn(batch, capacity, RANK + ROPE, generator=generator, dtype=torch.float64).to(dtype)
    q = torch.randn(batch, queries, HEADS, RANK + ROPE, generator=generator, dtype=torch.float64).to(dtype)
    key = torch.arange(capacity)
    position = torch.tensor(lengths)[:, None] - queries + torch.arange(queries)
    visible = (key <= position[..., None]) & (key >= torch.tensor(starts)[:, None, None])
    cache[~visible.any(1)] = torch.nan
    scores = torch.rand(visible.shape, generator=generator).masked_fill(~visible, -torch.inf)
    chosen = scores.topk(min(count, capacity), dim=-1).indices
    limits = {
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "starts": torch.tensor(starts, dtype=torch.int32),
    }
    return {
        "inputs": (q[..., :RANK], q[..., RANK:], cache[..., :RANK], cache[..., RANK:]),
        "limits": {**limits, "indices": chosen.int(), "scale": SCALE},
        "mask": torch.zeros_like(visible).scatter(-1, chosen, True) & visible,
    }


def dense(inputs: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a mask over all tokens, in float64."""
    q_latent, q_rope, latent, k_rope = (torch.nan_to_num(each.double()) for each in inputs)
    scores = torch.einsum("bshr,btr->bsht", q_latent, latent) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
    scores = (SCALE * scores).masked_fill(~mask[:, :, None], -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1))  # a query without visible tokens
    return torch.einsum("bsht,btr->bshr", weights, latent), scores.logsumexp(-1)


# Longer than the selection; shorter, and padded on the left; one token; none.
CASES = [
    ([70, 33], [0, 0], 1, 12),
    ([40, 9, 20], [0, 2, 15], 3, 11),
    ([1, 64], [0, 60], 1, 8),
    ([0, 5], [0, 0], 1, 4),
]


@pytest.mark.parametrize(("lengths", "starts", "queries", "count"), CASES)
def test_the_reference_is_dense_attention_with_a_mask(lengths, starts, queries, count) -> None:
    case = problem(lengths, starts, queries, count, torch.float64)
    out, lse = reference.mla_decode(*case["inputs"], **case["limits"])
    expected, expected_lse = dense(case["inputs"], case["mask"])
    assert torch.allclose(out, expected) and torch.allclose(lse, expected_lse)


@pytest.mark.parametrize(("lengths", "starts", "queries", "count"), CASES)
def test_the_kernel_is_the_reference(lengths, starts, queries, count) -> None:
    pytest.importorskip("triton")
    from headwise.kernels.mla_decode import triton

    half = DEVICE == "cuda"
    case = problem(lengths, starts, queries, count, torch.float16 if half else torch.float32)
    inputs = tuple(each.to(DEVICE) for each in case["inputs"])
    limits = {n: each.to(DEVICE) if isinstance(each, Tensor) else each for n, each in case["limits"].items()}
    out, lse = triton.mla_decode(*inputs, **limits)
    expected, expected_lse = dense(case["inputs"], case["mask"])
    tolerance = 4e-3 if half else 1e-5
    assert torch.allclose(out.cpu().double(), expected, atol=tolerance)
    assert torch.allclose(lse.cpu().double(), expected_lse, atol=tolerance)


def test_indices_and_a_block_table_contradict() -> None:
    case = problem([20], [0], 1, 4, torch.float32)
    with pytest.raises(ValueError, match="take the place of a block table"):
        mla_decode(*case["inputs"], **case["limits"], window=3)
