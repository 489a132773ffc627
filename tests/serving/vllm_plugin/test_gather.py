"""Gathering a cached prefix: equal to copying token by token, and vLLM's own operator where it can."""

from __future__ import annotations

import importlib

import pytest
import torch

from headwise.serving.vllm_plugin.gather import any_row, gather_rows
from tests.serving.plugin_host import noise, paged
from tests.serving.vllm_plugin import stand_ins
from tests.serving.vllm_plugin.stand_ins import PAGE


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_cached_prefix_is_gathered_at_any_row(fp8: bool) -> None:
    cache = noise(2, 64, 304)
    if fp8:
        cache = cache.to(torch.float8_e4m3fn)
    pages, table = paged(cache.view(torch.uint8) if fp8 else cache, PAGE)
    lengths, starts = [20, 7], torch.tensor([16, 3], dtype=torch.int32)
    limits = torch.tensor([0, 20, 27], dtype=torch.int32)
    sequence = torch.tensor([0] * 20 + [1] * 7 + [0] * 5, dtype=torch.int32)
    dst = torch.full((40, 304), torch.nan)
    scale = torch.tensor(0.5)
    gather_rows(pages, dst, table, limits, sequence, 27, "fp8" if fp8 else "auto", scale, starts)
    parts = [cache[i, s : s + n].float() for i, (s, n) in enumerate(zip(starts.tolist(), lengths, strict=True))]
    torch.testing.assert_close(dst[:27], torch.cat(parts) * (0.5 if fp8 else 1.0))
    assert dst[27:].isnan().all()


def test_vllms_operator_gathers_the_rows_that_it_takes() -> None:
    import vllm._custom_ops as operators  # the stand-in

    stock = stand_ins.gather_and_maybe_dequant_cache
    assert operators.gather_and_maybe_dequant_cache is stock
    importlib.import_module("headwise.serving.vllm_plugin.mla_backend")
    wrapped = operators.gather_and_maybe_dequant_cache
    assert wrapped is not stock and any_row(wrapped) is wrapped
    for row in (*stand_ins.ROWS, 304):
        pages, table = paged(noise(1, 16, row), PAGE)
        limits, sequence = torch.tensor([0, 16]), torch.zeros(16, dtype=torch.int32)
        wrapped(pages, torch.zeros(16, row), table, limits, sequence, 16, "auto", torch.tensor(1.0))
        wrapped(
            src_cache=pages, dst=torch.zeros(16, row), block_table=table, cu_seq_lens=limits,
            token_to_seq=sequence, num_tokens=16, kv_cache_dtype="auto", scale=torch.tensor(1.0),
        )  # fmt: skip
    assert stand_ins.CALLS == ["gather"] * 6
