"""vLLM's FlashMLA backend is chosen for the row of its kernel."""

from __future__ import annotations

import importlib

import pytest

from tests.serving.vllm_plugin import stand_ins


def test_flash_mla_gets_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)
    module = importlib.import_module("headwise.serving.vllm_plugin.flash_mla")
    assert module.FlashMLABackend.get_supported_head_sizes() == [320, 512, 576]
    assert module.FlashMLABackend576.get_supported_head_sizes() == [576]
