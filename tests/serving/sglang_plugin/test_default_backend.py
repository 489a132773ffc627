"""The default backend of SGLang: kept where it takes the shape, else the one that takes every shape."""

from __future__ import annotations

from typing import Any

import pytest

from headwise.serving.sglang_plugin.default_backend import after_default
from tests.serving.sglang_plugin.stand_ins import model_config


@pytest.mark.parametrize(
    "default, rank, dims, expected",
    [
        ("fa3", 512, (128, 64, 128), None), ("fa3", 256, (128, 64, 128), None),
        ("fa3", 448, (64, 64, 128), None),
        ("fa3", 448, (64, 64, 64), "triton"), ("fa3", 256, (32, 32, 64), None), ("fa3", 256, (16, 32, 128), None),
        ("fa3", 224, (128, 64, 128), "triton"), ("fa3", 576, (128, 64, 128), "triton"),
        ("fa3", 512, (128, 96, 128), "triton"), ("fa3", 260, (128, 64, 128), "triton"),
        ("fa3", 256, (192, 64, 256), None), ("fa3", 256, (240, 64, 304), "triton"),
        ("flashinfer", 512, (128, 64, 128), None), ("flashinfer", 384, (128, 64, 128), "triton"),
        ("flashinfer", 512, (64, 64, 64), "triton"), ("triton", 48, (64, 16, 64), None),
        ("aiter", 48, (64, 16, 64), None),
    ],
)  # fmt: skip
def test_the_default_is_kept_where_it_takes_the_shape(
    default: str, rank: int, dims: tuple[int, int, int], expected: str | None
) -> None:
    nope, rope, value = dims
    config = model_config(rank, rope, nope=nope, value=value)
    assert after_default(default, None, True, config) == expected


@pytest.mark.parametrize("default", ["fa3", "flashinfer"])
@pytest.mark.parametrize("missing", ["qk_nope_head_dim", "v_head_dim", "kv_lora_rank"])
def test_a_class_without_a_field_keeps_the_default(default: str, missing: str) -> None:
    config = model_config(256, 32)
    delattr(config, missing)
    assert after_default(default, None, True, config) is None


@pytest.mark.parametrize("use_mla, text", [(False, {}), (True, {"index_topk": 2048})])
def test_other_models_keep_the_default(use_mla: bool, text: dict[str, Any]) -> None:
    assert after_default("fa3", None, use_mla, model_config(48, 16, **text)) is None
