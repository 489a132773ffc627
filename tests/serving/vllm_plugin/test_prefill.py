"""The prefill of vLLM at head dims that its stock backend leaves out."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.serving.vllm_plugin import stand_ins


@pytest.mark.parametrize(
    "dimensions, fits, version",
    [
        ((128, 64, 128), True, 3), ((192, 64, 256), True, 3), ((64, 64, 64), True, 2), ((32, 16, 48), True, 2),
        ((64, 48, 128), False, None), ((256, 64, 128), False, None), ((20, 16, 20), False, None),
    ],
)  # fmt: skip
def test_prefill_takes_what_flash_attention_can(
    dimensions: Any, fits: bool, version: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins.install(monkeypatch)
    backend = importlib.import_module("headwise.serving.vllm_plugin.prefill").AnyHeadsPrefillBackend
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    named = dict(zip(names, dimensions, strict=True))
    assert backend.supports_mla_dimensions(stand_ins.MLADimensions(**named)) == fits
    if fits:
        made = backend(**named)
        assert made.vllm_flash_attn_version == version and made.requires_v_padding == (version == 2)
        if version == 2:
            assert made.flash_attn_varlen_func() == 2
