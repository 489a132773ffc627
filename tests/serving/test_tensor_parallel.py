"""What a conversion saves on each GPU of tensor parallelism."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headwise.models.layout import AttentionLayout
from headwise.serving.tensor_parallel import GpuCache, gpu_caches, unpaid_degree

# Llama-3-8B.
GQA = AttentionLayout(32, 8, 128, 128, 128)
MLA = AttentionLayout(32, 32, 192, 128, 64, None, 512, 64)


def test_the_degree_from_which_mla_saves_nothing() -> None:
    assert (unpaid_degree(GQA, MLA) or "").startswith("From tensor parallel 4 on, MLA saves no cache")
    small = replace(MLA, kv_lora_rank=64)
    assert unpaid_degree(replace(GQA, num_key_value_heads=32), small) is None
    assert unpaid_degree(MLA, MLA) is None


@pytest.mark.parametrize(("groups", "words"), [(1, "1 KV head saves no cache"), (4, "4 KV heads save no cache")])
def test_fewer_kv_heads_save_nothing_where_each_gpu_has_one(groups: int, words: str) -> None:
    note = str(unpaid_degree(GQA, GQA.with_groups(groups)))
    assert note.startswith(f"From tensor parallel 8 on, {words} on a GPU") and note.endswith("the source with 8.")
    assert unpaid_degree(replace(GQA, num_key_value_heads=32), GQA) is None, "32 GPUs are more than are compared"
    assert unpaid_degree(GQA, GQA) is None and unpaid_degree(GQA, GQA.with_groups(32)) is None


def test_the_cache_on_each_gpu() -> None:
    both = gpu_caches([GQA] * 2, [MLA] * 2, 4, 2)
    assert list(both) == [GpuCache(tp, 2 * 4 * 2048 / tp, 2 * 2 * 576) for tp in (2, 4, 8)]
    heads = replace(GQA, num_attention_heads=40, num_key_value_heads=10)
    few = gpu_caches([heads], [heads.with_groups(5)], 2, 2)
    assert list(few) == [GpuCache(2, 2 * 1280, None)], "neither 5 nor 10 heads are divided among 4 GPUs"
    odd = replace(GQA, num_attention_heads=9, num_key_value_heads=3)
    assert not list(gpu_caches([odd], [odd.with_groups(1)], 2, 2))
