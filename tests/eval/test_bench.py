"""`bench` measures two models side by side; the numbers it prints add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from headwise.errors import HeadwiseError, SettingError
from headwise.eval.bench import bench_model

COMMON = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128,
)  # fmt: skip
LATENT = dict(
    kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, q_lora_rank=None,
    first_k_dense_replace=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent with 4 heads of 16 and a child with a latent of 16 + 16: a quarter of the cache."""
    root = tmp_path_factory.mktemp("models")
    for name, config in (("child", DeepseekV3Config(**COMMON, **LATENT)), ("parent", LlamaConfig(**COMMON))):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return root / "child", root / "parent"


def test_bench(folders: tuple[Path, Path]) -> None:
    child, parent = folders
    memory = 4 * 2**20
    result = bench_model(
        child, parent, context="32", batch=2, memory=memory, device="cpu", dtype="float32", steps=4
    )
    assert [speed.model for speed in result.same_batch] == [str(parent), str(child)]
    before, after = result.same_batch
    assert before.cache_bytes == 4 * after.cache_bytes
    for speed in (*result.same_batch, *result.equal_memory):
        assert speed.decode_tokens_per_second == pytest.approx(speed.batch / speed.seconds_per_step)
        assert speed.prefill_seconds > 0
    for speed in result.equal_memory:
        one = speed.cache_bytes / speed.batch * 32 / (32 + 4 + 4)
        assert speed.weight_bytes + speed.batch * one <= memory < speed.weight_bytes + (speed.batch + 1) * one * 1.1
    parent_speed, child_speed = result.equal_memory
    assert child_speed.batch > 3 * parent_speed.batch
    assert result.speedup == child_speed.decode_tokens_per_second / parent_speed.decode_tokens_per_second
    assert json.loads(json.dumps(result.to_dict()))["speedup"] == result.speedup


def test_too_little_memory_is_said(folders: tuple[Path, Path]) -> None:
    with pytest.raises(HeadwiseError, match=r"32 tokens needs \d+ kB, more than 131 kB"):
        bench_model(*folders, context=32, memory=2**17, device="cpu", dtype="float32", steps=1)


@pytest.mark.parametrize(
    "options",
    [{"context": 0}, {"batch": -1}, {"memory": "much"}, {"steps": 1.5}, {"dtype": "int8"}, {"device": "abacus"}],
    ids=lambda given: next(iter(given)),
)
def test_wrong_settings_are_refused(folders: tuple[Path, Path], options: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as caught:
        bench_model(*folders, **options)
    assert caught.value.field == next(iter(options))
