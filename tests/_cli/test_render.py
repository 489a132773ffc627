"""Results as text for a reader."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headwise._cli import console, render
from headwise.convert.inspect import inspect_model
from headwise.io.source import EMBEDDED_MODEL
from headwise.serving.engines import ENGINES


def test_layers_are_listed_as_ranges() -> None:
    assert render.format_ranges([0, 1, 2, 5]) == "0-2, 5"
    assert render.format_ranges(range(0, 80, 2)).startswith("40 layers: 0, 2")


@pytest.mark.parametrize(("saved", "text"), [(0.75, "75.0%"), (0.001, "0.1%"), (0.0, "none"), (-1.0, "grows 2x")])
def test_a_saving_is_a_share_or_a_factor(saved: float, text: str) -> None:
    assert render.format_saving(saved) == text


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


def test_an_inspection_has_a_word_for_each_engine_or_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    inspection = inspect_model(EMBEDDED_MODEL)
    render.render_inspection(inspection)
    table = [line.split("  ") for line in capsys.readouterr().out.splitlines() if "llama.cpp" in line]
    assert [word.strip() for word in table[0] if word.strip()][1:] == list(ENGINES) and len(table) == 1
    render.render_inspection(inspection, reasons=True)
    printed = capsys.readouterr().out
    rows = len(inspection.options) + 1
    assert all(printed.count(f"{name}: ") == rows for name in ENGINES)


@pytest.mark.parametrize(
    ("parent", "commands"),
    [
        ("org/name", "headwise eval OUT --baseline org/name"),
        ("my model", "headwise eval OUT --baseline 'my model'"),
        ("a.gguf", "headwise convert a.gguf PARENT --dtype bfloat16; headwise eval OUT --baseline PARENT"),
    ],
)
def test_a_conversion_ends_with_commands_that_evaluate_it(parent: str, commands: str) -> None:
    plan = SimpleNamespace(exact=False, model=parent)
    loss = SimpleNamespace(before=2.0, after=2.5, tokens=1024, source="mixture")
    for text_loss in (None, loss):
        result: Any = SimpleNamespace(plan=plan, out="OUT", text_loss=text_loss)
        assert render._quality(result).endswith(f"easured: run {commands}")
