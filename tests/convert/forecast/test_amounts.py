"""The steps of a refit that the forecast affords."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.convert.calibration.calibrate import plan_calibration
from headwise.convert.choose import choose_target
from headwise.convert.forecast import amounts
from headwise.convert.forecast.amounts import choose_refit
from headwise.convert.settings import ConvertSettings
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from tests import tiny_models

CPU = torch.device("cpu")


def decided(tmp_path: Path, **settings: Any) -> tuple[Any, Any, Any, ConvertSettings]:
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    given = ConvertSettings(to="mqa", **settings)
    return parent, arch, choose_target(parent, arch, given), given


@pytest.mark.parametrize(("each", "steps"), [(0.05, 300), (0.1, 200), (0.2, 100), (1.0, 0)])
def test_auto_takes_the_most_steps_that_the_forecast_affords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: float, steps: int
) -> None:
    parent, arch, target, _ = decided(tmp_path)
    monkeypatch.setattr(amounts, "refit_seconds", lambda *given: each * given[3])
    choice = choose_refit(parent, arch, target, "auto", 32, CPU)
    words = "they are forecast at" if steps else "100 steps per layer are forecast at"
    assert choice.steps == steps and choice.reason is not None and words in choice.reason
    assert ("within" if steps else "over") in choice.reason
    assert choose_refit(parent, arch, target, "layers", 32, CPU) == amounts.RefitChoice(300)
    assert choose_refit(parent, arch, target, 7, 32, CPU) == amounts.RefitChoice(7)
    assert choose_refit(parent, arch, target, "off", 32, CPU) == amounts.RefitChoice(0)


def test_a_resumed_run_keeps_the_choices_of_the_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may be slower than it was."""
    parent, arch, target, settings = decided(tmp_path, calibration_tokens=4096)
    monkeypatch.setattr(amounts, "refit_seconds", lambda *given: 0.0)
    first = plan_calibration(parent, arch, target, settings, CPU)
    monkeypatch.setattr(amounts, "refit_seconds", lambda *given: 1e9)
    again = plan_calibration(parent, arch, target, settings, CPU, first.described() if first else None)
    fresh = plan_calibration(parent, arch, target, settings, CPU)
    assert first and again and fresh
    assert first.described() == again.described() and first.steps == 300 and fresh.steps == 0
