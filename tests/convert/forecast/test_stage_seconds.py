"""The forecast of the stages: what it grows with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwise.convert.choose import choose_target
from headwise.convert.forecast import machine
from headwise.convert.forecast import stage_seconds as seconds
from headwise.convert.settings import ConvertSettings
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
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


def test_a_layer_that_cannot_be_timed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    monkeypatch.setattr(seconds, "attention_seconds", lambda *_: None)
    assert seconds.forward_seconds(parent, 64, CPU) > 0
    assert machine.element_seconds() > 0 and machine.call_seconds() > 0
