"""The forecast of the stages: what it grows with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headwise.convert.choose import choose_target
from headwise.convert.forecast import machine
from headwise.convert.forecast import stage_seconds as seconds
from headwise.convert.settings import ConvertSettings
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from headwise.models.layout import IndexerShape
from tests import tiny_models

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("to", [{"to": "mqa"}, {"to": "mla", "cache": 0.5}])
def test_stages_grow_with_the_text_and_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: dict[str, object], device: torch.device
) -> None:
    monkeypatch.setattr(seconds, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(seconds, "attention_seconds", lambda *_: 0.001)
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    target = choose_target(parent, arch, ConvertSettings(**to))  # type: ignore[arg-type]

    def stages(times: int) -> list[float]:
        return [
            seconds.forward_seconds(parent, 64 * times, device),
            seconds.refit_seconds(parent, arch, target, 10 * times, 32, device),
            seconds.output_seconds(parent, arch, target, 10_000_000 * times, 32, device),
        ]

    for one, three in zip(stages(1), stages(3), strict=True):
        assert three == pytest.approx(3 * one, rel=0.01) and one > 0
    once, twice = (seconds.calibration_seconds(parent, arch, n, 32, device) for n in (4096, 8192))
    assert 0 < once < twice <= 2 * once
    assert seconds.closed_form_seconds(parent, arch, target, device) > 0


def test_a_small_step_on_a_gpu_takes_as_long_as_its_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    target = choose_target(parent, arch, ConvertSettings(to="mqa"))
    layers = len(target.layouts)
    launches = seconds.refit_seconds(parent, arch, target, 10, 32, GPU)
    assert launches == pytest.approx(seconds.CHECKED * 10 * layers * seconds.CUDA_STEP)
    searched = choose_target(parent, arch, ConvertSettings(to="mla", cache=0.5))
    calls = layers * seconds.SEARCH_CALLS * seconds.CUDA_CALL
    assert seconds.closed_form_seconds(parent, arch, searched, GPU) == pytest.approx(calls, rel=0.2)
    monkeypatch.setattr(seconds, "CUDA_TRAINED_FLOPS", 1e6)  # a slow card: now the products decide
    assert seconds.refit_seconds(parent, arch, target, 10, 32, GPU) > 10 * launches


def test_a_layer_that_cannot_be_timed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    monkeypatch.setattr(seconds, "attention_seconds", lambda *_: None)
    assert seconds.forward_seconds(parent, 64, CPU) > 0
    assert machine.element_seconds() > 0 and machine.call_seconds() > 0


@pytest.mark.parametrize("device", [CPU, GPU])
def test_scores_of_an_indexer_grow_with_the_square_of_the_text(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seconds, "product_rate", lambda *_: 1e9)
    shape = IndexerShape(64, 8, 32)
    once = seconds.index_score_seconds(shape, 512, device)
    assert seconds.index_score_seconds(shape, 1024, device) == pytest.approx(4 * once) and once > 0
    assert seconds.index_score_seconds(replace(shape, index_n_heads=24), 512, device) == pytest.approx(3 * once)


def test_long_sequences_have_a_longer_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(seconds, "attention_seconds", lambda *arguments: 1e-6 * arguments[3])
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    assert seconds.forward_seconds(parent, 64, CPU, 4096) > seconds.forward_seconds(parent, 64, CPU)
