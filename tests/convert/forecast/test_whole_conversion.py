"""The forecast of a conversion: what is in memory at once, and what takes time at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.choose import choose_target
from headwise.convert.forecast import stage_seconds, whole_conversion
from headwise.convert.forecast.peak_memory import peak_memory
from headwise.convert.forecast.whole_conversion import forecast_conversion
from headwise.convert.settings import ConvertSettings
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from tests import tiny_models


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_take_the_whole_model_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(stage_seconds, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(stage_seconds, "attention_seconds", lambda *_: 0.001)
    parent = open_checkpoint(tiny_models.save("llava", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    settings = ConvertSettings(to="mqa", verify=False)
    target = choose_target(parent, arch, settings)
    pairs = CalibrationPlan("pairs.jsonl", 20, 24, 0, 0, images=Path("pairs.jsonl"))
    where = torch.device(device)
    peak, _ = forecast_conversion(parent, arch, target, settings, pairs, None, [where], where)
    assert peak == peak_memory(parent, arch, target, pairs, where) + 4 * parent.num_parameters


def test_files_are_copied_while_a_gpu_converts_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    settings = ConvertSettings(to="mqa", calibrate="none", verify=False)
    target = choose_target(parent, arch, settings)

    def forecast(device: str, seconds: float) -> float:
        monkeypatch.setattr(whole_conversion, "closed_form_seconds", lambda *_: seconds)
        where = torch.device(device)
        return forecast_conversion(parent, arch, target, settings, None, None, [where], where)[1]["files"]

    monkeypatch.setattr(whole_conversion, "FILE_RATE", parent.nbytes / 10)
    assert [forecast("cpu", seconds) for seconds in (0.0, 4.0, 40.0)] == [10.0, 10.0, 10.0]
    assert [forecast("cuda", seconds) for seconds in (0.0, 4.0, 40.0)] == [10.0, 6.0, 0.0]
