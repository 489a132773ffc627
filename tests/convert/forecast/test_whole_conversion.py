"""The forecast of a conversion: what is in memory at once, and what takes time at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.convert.calibration import calibrate
from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.corpus import NUM_HELDBACK, TextChoice
from headwise.convert.choose import choose_target
from headwise.convert.forecast import stage_seconds, whole_conversion
from headwise.convert.forecast.peak_memory import LOSS_COPIES, RESTING_BYTES, peak_memory, whole_model_memory
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


def test_a_gpu_gets_a_model_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one H200 a 7B took 22.1 GB, and 2.7 GB of the host. With all pages of its file the forecast was 30 GB."""
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    settings = ConvertSettings(to="mqa", calibrate="none", verify=False)
    target = choose_target(parent, arch, settings)
    file = sum(tensor.nbytes for tensor in target.outputs)
    whole = whole_model_memory(parent, arch, target, loss_tokens=1)
    logits = (1 + LOSS_COPIES) * 4 * parent.config["vocab_size"]
    assert whole == RESTING_BYTES + 4 * parent.num_parameters + parent.nbytes and parent.nbytes > file > logits
    streamed = whole_model_memory(parent, arch, target, loss_tokens=1, streamed=True)
    assert streamed == RESTING_BYTES + 4 * parent.num_parameters + logits
    with_damage = whole_model_memory(parent, arch, target, damage_tokens=1)
    assert (
        with_damage - whole_model_memory(parent, arch, target, damage_tokens=1, streamed=True) > parent.nbytes / 2
    )

    def forecasts_pages(device: str) -> bool:
        where, given = torch.device(device), dict[str, Any]()
        monkeypatch.setattr(whole_conversion, "whole_model_memory", lambda *_, **more: given.update(more) or 0)
        forecast_conversion(parent, arch, target, settings, None, None, [where], where)
        return not given["streamed"]

    assert [forecasts_pages(device) for device in ("cpu", "cuda")] == [True, False]


def test_the_reason_for_sampled_text_and_its_forecast_count_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    settings = ConvertSettings(to="mqa", calibration_tokens=1000, refit="off", verify=False)
    target, where, counted = choose_target(parent, arch, settings), torch.device("cuda"), []

    def choose(checkpoint: Any, arch: Any, calibrate: str, tokens: int, *more: Any) -> TextChoice:
        counted.append(tokens)
        return TextChoice("sampled")

    monkeypatch.setattr(calibrate, "choose_text", choose)
    plan = calibrate.plan_calibration(parent, arch, target, settings, where)
    monkeypatch.setattr(
        whole_conversion, "sampling_seconds", lambda _, tokens, *more: counted.append(tokens) or 0.0
    )
    forecast_conversion(parent, arch, target, settings, plan, None, [where], where)
    assert plan is not None and counted == [plan.tokens + NUM_HELDBACK * plan.length] * 2
