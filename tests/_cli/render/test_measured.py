"""Measured results as text for a reader."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headwise._cli import console, render
from tests.eval.evaluations import full


def test_the_loss_of_an_uptraining_is_compared_with_the_parent(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    losses = {"before": 3.5, "after": 3.25, "parent": 3.0, "gap_closed": 0.5}
    result: Any = SimpleNamespace(**losses, layers={}, tokens=10, seconds=1.0, out="out")
    render.render_uptraining(result)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert "Gap to the parent closed: 50.0%." in printed
    assert ["before", "3.5000", "+0.5000"] in rows and ["after", "3.2500", "+0.2500"] in rows
    assert ["parent", "3.0000"] in rows


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_of_an_evaluation_fits_the_width_and_keeps_every_figure(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    evaluation = full()
    console.configure(quiet=True)
    render.render_evaluation(evaluation)
    lines = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("figure"))
    stop = next(place for place, line in enumerate(lines) if line.startswith("Change: child minus parent"))
    table = lines[start:stop]
    assert table[0].split() == ["figure", "parent", "child", "change", "95%", "interval", "p", "(Holm)"]
    assert len(table) > 3 and max(map(len, table)) <= columns
    assert any("; flips +" in line for line in table)
