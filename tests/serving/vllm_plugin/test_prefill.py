"""The prefill of vLLM at head dims that its stock backend leaves out."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.serving.vllm_plugin import stand_ins


@pytest.mark.parametrize("chosen", [2, 3, 4, None])
@pytest.mark.parametrize(
    "dimensions, fits, stock",
    [
        ((128, 64, 128), True, True), ((192, 64, 256), True, True), ((64, 64, 64), True, False),
        ((32, 16, 48), True, False), ((64, 48, 128), False, None), ((256, 64, 128), False, None),
        ((20, 16, 20), False, None),
    ],
)  # fmt: skip
def test_prefill_takes_what_flash_attention_can(
    dimensions: Any, fits: bool, stock: bool | None, chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the version 3 that vLLM chooses stays for dims that it leaves out."""
    stand_ins.install(monkeypatch)
    monkeypatch.setattr(stand_ins, "FLASH_ATTENTION", chosen)
    backend = importlib.import_module("headwise.serving.vllm_plugin.prefill").AnyHeadsPrefillBackend
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    named = dict(zip(names, dimensions, strict=True))
    assert backend.supports_mla_dimensions(stand_ins.MLADimensions(**named)) == fits
    if fits:
        made = backend(**named)
        version = chosen if stock or chosen == 3 else 2
        assert made.vllm_flash_attn_version == version and made.requires_v_padding == (not stock)
        if not stock:
            assert made.flash_attn_varlen_func() == version
