"""Timings of this machine: which layers can be timed, and what a forecast makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwise.convert.choose import choose_target
from headwise.convert.forecast import machine
from headwise.convert.settings import ConvertSettings
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from headwise.models.protocol import find_attention_model
from tests import tiny_models


def test_an_operation_is_repeated_and_its_least_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FEWEST", 3)
    times = iter([0.0, 0.2, 0.2, 0.25, 0.25, 0.27, 0.27, 0.3])
    monkeypatch.setattr(machine, "clock", lambda: next(times))
    runs: list[int] = []
    assert machine.best_seconds(lambda: runs.append(1)) == pytest.approx(0.02)
    assert len(runs) == 4


def test_a_long_operation_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0])
    monkeypatch.setattr(machine, "clock", lambda: next(times))
    runs: list[int] = []
    assert machine.best_seconds(lambda: runs.append(1)) == 5.0
    assert len(runs) == 1


def test_nothing_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "clock", lambda: 0.0)
    assert machine.best_seconds(lambda: None) == machine.TICK


def test_a_rate_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = machine.product_rate(torch.float32, 5, 7, 3)
    assert rate > 0
    monkeypatch.setattr(machine, "best_seconds", lambda work: 1e9)
    assert machine.product_rate(torch.float32, 5, 7, 3) == rate


@pytest.mark.parametrize("kind", ["forward", "trained", "stats"])
@pytest.mark.parametrize("to", [{"to": "mqa"}, {"to": "mla", "cache": 0.5}])
def test_parent_and_result_are_timed(tmp_path: Path, to: dict[str, object], kind: str) -> None:
    parent = open_checkpoint(tiny_models.save("llama", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    target = choose_target(parent, arch, ConvertSettings(**to))  # type: ignore[arg-type]
    child = find_attention_model(target.config, [tensor.name for tensor in target.outputs])
    for config, stock in ((parent.config, arch), (target.config, child)):
        seconds = machine.attention_seconds(config, stock, 1, 24, kind)
        assert seconds is not None and 0 < seconds < 1


def test_an_encoder_decoder_is_not_timed(tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_models.save("t5gemma", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    assert machine.attention_seconds(parent.config, arch, 0, 24, "forward") is None
