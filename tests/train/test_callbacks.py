"""Callbacks: the curve on disk and in the progress, its continuation, time budget and divergence."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headwise.errors import HeadwiseError
from headwise.progress import Progress
from headwise.train.callbacks import (
    CurveCallback,
    Diverged,
    DivergenceGuard,
    TimeBudget,
    check_reporters,
    gap_closed,
)


class Heard(Progress):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.reports: list[tuple[int, dict[str, object]]] = []

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append((name, total))

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.reports.append((amount, fields))


def state(step: int, steps: int = 40) -> Any:
    return SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=True)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def run(curve: CurveCallback, begin: int, reports: dict[int, dict[str, float]]) -> None:
    curve.on_train_begin(None, state(begin), None)
    for step, logs in reports.items():
        curve.on_log(None, state(step), None, logs=logs)


def test_a_curve_has_how_much_of_the_gap_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    heard = Heard()
    curve = CurveCallback(tmp_path / "curve.csv", 1000, heard, parent=2.0)
    run(curve, 0, {0: {"eval_loss": 3.0}})
    for step, logs in ((10, {"loss": 2.6, "learning_rate": 0.1}), (20, {"eval_loss": 2.25})):
        control = SimpleNamespace(should_evaluate=True, should_save=False)
        curve.on_step_begin(None, state(step - 1), control)
        clock[0] += 10.0
        curve.on_step_end(None, state(step), control)
        clock[0] += 77.0  # a measurement, which is not training
        curve.on_log(None, state(step), control, logs=logs)

    read = rows(tmp_path / "curve.csv")
    assert [row["tokens"] for row in read] == ["0", "10000", "20000"]
    assert [row["closed"] for row in read] == ["0.0000", "", "0.7500"]
    assert [row["heldout"] for row in read] == ["3.0", "", "2.25"]
    assert heard.stages == [("training", 40_000)]
    amounts, figures = zip(*heard.reports, strict=True)
    assert amounts == (0, 10_000, 10_000)
    assert figures[1] == {"loss": 2.6, "tokens/s": "1,000"}  # the gap belongs to a held-out loss
    assert figures[2] == {"heldout": 2.25, "gap closed": "75.0%", "tokens/s": "1,000"}


def test_a_curve_has_both_its_ends(tmp_path: Path) -> None:
    curve = CurveCallback(tmp_path / "curve.csv", 1000, Heard(), parent=2.0, before=3.0)
    curve.on_train_begin(None, state(0), None)
    assert [(row["tokens"], row["heldout"], row["closed"]) for row in rows(curve.path)] == [("0", "3.0", "0.0000")]
    for step, measured in ((39, False), (40, True)):
        control = SimpleNamespace(should_evaluate=False, should_save=False)
        curve.on_step_end(None, state(step), control)
        assert control.should_evaluate is measured


def test_a_resumed_curve_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path, heard = tmp_path / "curve.csv", Heard()
    run(CurveCallback(path, 10, Heard()), 0, {step: {"loss": 4.0 - step / 10} for step in (5, 10, 15)})
    run(CurveCallback(path, 10, heard), 10, {step: {"loss": 40.0} for step in (15, 20)})
    read = rows(path)
    assert [row["step"] for row in read] == ["5", "10", "15", "20"]
    assert [row["loss"] for row in read] == ["3.5", "3.0", "40.0", "40.0"]
    assert heard.stages == [("training", 300)]  # 30 steps are left
    assert [amount for amount, _ in heard.reports] == [50, 50]


def test_the_gap() -> None:
    assert gap_closed(2.5, parent=2.0, before=3.0) == pytest.approx(0.5)
    assert gap_closed(1.9, parent=2.0, before=3.0) == pytest.approx(1.1)
    assert gap_closed(3.5, parent=2.0, before=3.0) == pytest.approx(-0.5)
    assert gap_closed(2.0, parent=2.0, before=2.009) is None
    assert gap_closed(2.0, parent=None, before=3.0) is None


def test_a_reporter_that_is_not_there_is_refused() -> None:
    assert check_reporters([]) == []
    with pytest.raises(HeadwiseError, match="cannot report to 'tensorbord' here"):
        check_reporters(["tensorbord"])


def test_a_time_budget_shortens_the_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 100.0, 105.0])  # made, begun, half-way through the timed steps, their end
    monkeypatch.setattr(time, "time", lambda: next(clock))
    notes: list[str] = []
    budget = TimeBudget(125.0, SimpleNamespace(note=notes.append))  # type: ignore[arg-type]
    arguments = SimpleNamespace(world_size=1)
    state = SimpleNamespace(global_step=0, max_steps=1000, is_world_process_zero=True)
    budget.on_train_begin(arguments, state, None)
    for step in range(1, 60):
        state.global_step = step
        budget.on_step_end(arguments, state, None)
    assert state.max_steps == 150  # 25 steps took 5 s, 20 s are left after step 50
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("logs", "reason"),
    [
        ({"loss": float("nan")}, "its loss is nan"),
        ({"loss": 1.0, "grad_norm": float("inf")}, "its grad norm is inf"),
        ({"loss": 3.2}, "its loss rose to 3.2"),
    ],
)
def test_a_diverged_loss_stops_the_run(logs: dict[str, float], reason: str) -> None:
    guard = DivergenceGuard(None)
    guard.on_log(None, state(1), None, logs={"loss": 1.05})
    guard.on_log(None, state(2), None, logs={"loss": 3.0})  # not above twice the lowest loss and one nat more
    with pytest.raises(Diverged, match=reason) as stopped:
        guard.on_log(None, state(3), None, logs=logs)
    assert "no checkpoint from before" in stopped.value.message
