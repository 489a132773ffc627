"""An inspection as text for a reader."""

from __future__ import annotations

import pytest

from headwise._cli import console, render
from headwise.convert.inspect import inspect_model
from headwise.io.source import EMBEDDED_MODEL
from headwise.serving.engines import ENGINES


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
