"""The output sink: which stream gets what, clean text, progress as bars and as lines."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console

from headwise._cli import console
from tests.command_line import CONVERT, config_folder, library, run, run_script

__all__ = ["config_folder", "library"]


def test_json_is_one_object_and_nothing_else_on_stdout(library: SimpleNamespace) -> None:
    def report(**_: Any) -> Any:
        library.progress.stage("Count", total=2, unit="layers")
        library.progress.advance(2)
        library.progress.warn("careful")
        print("a library that prints")
        return SimpleNamespace(to_dict=lambda: {"nats": float("nan"), "path": Path("x"), "shape": (1, 2)})

    library.action = report
    result = run(*CONVERT, "--to", "mqa", "--json")
    assert json.loads(result.stdout) == {"nats": None, "path": "x", "shape": [1, 2]}
    assert "Count: 2 layers" in result.stderr and "careful" in result.stderr and "prints" in result.stderr

    quiet = run(*CONVERT, "--to", "mqa", "--json", "--quiet")
    assert json.loads(quiet.stdout) == json.loads(result.stdout)
    assert "Count" not in quiet.stderr and "careful" in quiet.stderr


def test_names_from_a_checkpoint_cannot_control_the_terminal(config_folder: str) -> None:
    config = Path(config_folder) / "config.json"
    config.write_text(json.dumps({"model_type": "\x1b]0;owned\x07\u202e[red]evil"}))
    result = run("inspect", config_folder)
    assert result.exit_code == 2
    assert "\x1b]" not in result.stderr and "\x07" not in result.stderr and "\u202e" not in result.stderr
    assert "[red]evil" in result.stderr


def test_no_color_is_honoured() -> None:
    assert "\x1b[" in run_script("convrt", FORCE_COLOR="1", NO_COLOR="", TERM="xterm").stderr
    assert "\x1b[" not in run_script("convrt", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm").stderr


def test_messages_of_the_library_get_flags(library: SimpleNamespace) -> None:
    def report(**_: Any) -> Any:
        library.progress.note("give `calibration_tokens`")
        library.progress.warn("leave out `verify`")
        return SimpleNamespace(to_dict=lambda: {"note": "give `rank`"})

    library.action = report
    result = run(*CONVERT, "--to", "mqa", "--json")
    assert "give --calibration-tokens" in result.stderr and "leave out --no-verify" in result.stderr
    assert json.loads(result.stdout) == {"note": "give `rank`"}


def test_a_long_message_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    console.error("x" * 10_000)
    assert len(capsys.readouterr().err) < 2 * console.MAX_MESSAGE


def test_a_terminal_gets_bars_with_amount_and_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    console.configure()
    with console.progress() as progress:
        progress.stage("Write", total=4_000, unit="bytes")
        progress.advance(4_000, layer="[bold]3")
    assert "Write" in screen.getvalue() and "4 kB of 4 kB" in screen.getvalue()
    assert "layer [bold]3" in screen.getvalue()


def test_a_terminal_gets_the_time_left_before_the_first_layer_and_after_a_slow_one() -> None:
    """Layers of a minute each: rich's own column shows no time for them."""
    console.configure()
    now = [0.0]
    bars = console._Bars(clock=lambda: now[0])

    def shown() -> str:
        screen = io.StringIO()
        rich.console.Console(file=screen, width=160).print(bars.display.get_renderable())
        return screen.getvalue()

    bars.stage("Converting", total=6, unit="layers")
    assert "0.0 s so far" in shown()
    bars.expect(300, done=2)
    now[0] += 20
    assert "2/6 layers 4:40 left" in shown()
    now[0] += 40
    bars.advance(layer=2)
    assert "3/6 layers 3:00 left layer 2" in shown()
    now[0] += 30
    assert "2:30 left" in shown()
    now[0] += 10
    bars.advance(layer=3)
    assert "4/6 layers 1:20 left layer 3" in shown()


def test_lines_give_the_forecast_before_the_first_layer(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    now = [0.0]
    lines = console._Lines(clock=lambda: now[0])
    lines.stage("Converting", total=4, unit="layers")
    lines.expect(120, done=1)
    now[0] += 30
    lines.advance(layer=1)
    assert capsys.readouterr().err.splitlines() == [
        "Converting: 1/4 layers, 2:00 left by the forecast",
        "Converting: 2/4 layers, layer 1, 1:00 left",
    ]


def test_the_time_left_leaves_out_the_first_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of 16 answers, which come one by one: the first batch takes 30 s, and others 12 s each."""
    console.configure()
    now = [0.0]
    lines = console._Lines(clock=lambda: now[0])
    lines.stage("tasks", total=96, unit="requests")
    for batch in range(3):
        now[0] += 12 if batch else 30
        for _ in range(16):
            lines.advance()
            now[0] += 0.01
    assert [line.rpartition(", ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "30 s so far",
        "1:00 left",
        "48 s left",
    ]


def test_lines_come_when_a_stage_is_long_and_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    now = [0.0]
    lines = console._Lines(clock=lambda: now[0])
    lines.stage("Calibrate", total=10, unit="layers")
    for layer in range(10):
        now[0] += 4
        lines.advance(layer=layer)
    lines.finish()
    assert capsys.readouterr().err.splitlines() == [
        "Calibrate: 3/10 layers, layer 2, 28 s left",
        "Calibrate: 6/10 layers, layer 5, 16 s left",
        "Calibrate: 9/10 layers, layer 8, 4.0 s left",
        "Calibrate: 10 layers in 40 s",
    ]
