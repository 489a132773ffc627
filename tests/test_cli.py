"""The command line: what is refused, what is passed on, where output goes, and what the exit code says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from headwise import format
from headwise._cli import console as ui
from headwise._cli import render as show
from headwise.cli import cli
from headwise.errors import HeadwiseError

CONVERT = ["convert", "model", "out"]


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli, arguments)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from headwise.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 61,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of the functions that work: they note their arguments and do what `does` says."""
    heard = SimpleNamespace(arguments={}, does=lambda **_: SimpleNamespace(to_dict=lambda: {"done": True}))

    def stand_in(*positional: Any, **arguments: Any) -> Any:
        assert not positional
        heard.progress = arguments.pop("progress", None)
        heard.arguments = arguments
        return heard.does(**arguments)

    for verb in ("convert.pipeline.convert_model", "convert.verify.check.verify_model"):
        module, function = f"headwise.{verb}".rsplit(".", 1)
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: stand_in}))  # type: ignore[misc]
    for kind in ("render_plan", "render_outcome", "render_verification"):
        monkeypatch.setattr(show, kind, lambda _: None, raising=False)
    return heard


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["convrt"], "convert"),
        (["convert"], "Missing argument 'MODEL'"),
        (["convert", "model"], "Missing argument 'OUT'"),
        (["convert", "--grops", "2"], "--groups"),
        (["recipes", "lst"], "list"),
        (CONVERT, "nothing to change"),
        ([*CONVERT, "--to", "gaq"], "Did you mean 'gqa'?"),
        ([*CONVERT, "--to", "gqa"], "--to gqa needs --groups"),
        ([*CONVERT, "--to", "gqa", "--groups", "0"], "--groups"),
        ([*CONVERT, "--to", "gqa", "--groups", "2", "--method", "optimum"], "Did you mean 'optimal'?"),
        ([*CONVERT, "--to", "gqa", "--groups", "2", "--method", "transmla"], "has no method 'transmla'"),
        ([*CONVERT, "--to", "mla", "--exact", "--groups", "2"], "--groups acts only with --to gqa"),
        ([*CONVERT, "--to", "mqa", "--groups", "1"], "--groups acts only with --to gqa"),
        ([*CONVERT, "--to", "mha", "--calibrate", "none"], "--calibrate acts only with"),
        ([*CONVERT, "--context", "99", "--refit", "off"], "--refit acts only with"),
        ([*CONVERT, "--to", "mla"], "--to mla needs --cache"),
        ([*CONVERT, "--to", "mla", "--rank", "64"], "--rank needs --rope-dim"),
        ([*CONVERT, "--to", "mla", "--rope-dim", "64"], "--rope-dim needs --rank"),
        ([*CONVERT, "--to", "mla", "--cache", "12.5%", "--rank", "64", "--rope-dim", "8"], "contradict"),
        ([*CONVERT, "--to", "mla", "--exact", "--refit", "off"], "contradict"),
        ([*CONVERT, "--to", "mla", "--cache", "120%"], "a fraction above 0 and up to 1 (100%), such as 0.125 or 12.5%"),
        ([*CONVERT, "--to", "mqa", "--refit", "never"], "auto, off or a number of steps"),
        ([*CONVERT, "--to", "mqa", "--moments", "a", "--save-moments", "b"], "contradict"),
        ([*CONVERT, "--to", "mqa", "--calibrate", "none", "--calibration-tokens", "9"], "--calibrate none"),
        ([*CONVERT, "--to", "mqa", "--rope", "ntk"], "--rope needs --context"),
        ([*CONVERT, "--context", "99", "--rope", "base"], "belong together"),
        ([*CONVERT, "--context", "99", "--rope", "ntk", "--rope-theta", "1e6"], "belong together"),
        ([*CONVERT, "--to", "mqa", "--window-layers", "all"], "--window-layers needs --sliding-window"),
        (["verify", "out", "--revision", "main"], "need --against"),
        (["recipes", "show", "no-such-recipe"], "no recipe"),
        (["inspect", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_mistake_gets_a_sentence(typed: list[str], said: str, library: SimpleNamespace) -> None:
    done = run(*typed)
    assert done.exit_code == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not library.arguments


def test_only_what_was_typed_is_passed_on(library: SimpleNamespace) -> None:
    assert run(*CONVERT, "--to", "gqa", "--groups", "2", "--no-verify", "--refit", "50").exit_code == 0
    assert library.arguments == {
        "model": "model",
        "out": Path("out"),
        "to": "gqa",
        "groups": 2,
        "verify": False,
        "refit": 50,
    }
    assert run(*CONVERT, "--to", "mla", "--cache", "12.5%").exit_code == 0
    assert library.arguments == {"model": "model", "out": Path("out"), "to": "mla", "cache": 0.125}


def test_every_option_of_convert_is_a_parameter_of_the_function() -> None:
    import inspect

    from headwise.convert.pipeline import convert_model

    shown = {"json", "quiet", "verbose"}
    assert {p.name for p in cli.commands["convert"].params} - shown == (
        inspect.signature(convert_model).parameters.keys() - {"progress"}
    )


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (HeadwiseError("config.json has no heads.", "Give it some."), 2, "Give it some."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (PermissionError(13, "Permission denied", "/nowhere"), 2, "/nowhere: Permission denied."),
        (OSError(5, "Input/output error"), 2, "the disk reports an error"),
        (KeyError("q_proj"), 2, "HEADWISE_DEBUG=1"),
    ],
)
def test_an_exception_becomes_a_sentence_and_a_code(
    problem: BaseException, code: int, said: str, library: SimpleNamespace
) -> None:
    def fail(**_: Any) -> None:
        raise problem

    library.does = fail
    done = run(*CONVERT, "--to", "mqa", HEADWISE_DEBUG="")
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in run(*CONVERT, "--to", "mqa", HEADWISE_DEBUG="1").stderr


def test_an_interrupted_conversion_says_how_to_go_on(library: SimpleNamespace) -> None:
    from headwise.io.workdir import Interrupted

    def stop(**_: Any) -> None:
        raise Interrupted("Interrupted; the work is kept.", "Go on with --resume.")

    library.does = stop
    done = run(*CONVERT, "--to", "mqa")
    assert done.exit_code == 130 and "Go on with --resume." in done.stderr


def test_a_failed_gate_exits_1_and_still_gives_its_object(library: SimpleNamespace) -> None:
    library.does = lambda **_: SimpleNamespace(passed=False, to_dict=lambda: {"passed": False})
    done = run("verify", "out", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout) == {"passed": False}
    assert "failed its checks" in done.stderr


def test_json_is_one_object_and_nothing_else_on_stdout(library: SimpleNamespace) -> None:
    def chatty(**_: Any) -> Any:
        library.progress.stage("Count", total=2, unit="layers")
        library.progress.advance(2)
        library.progress.warn("careful")
        print("a library that prints")
        return SimpleNamespace(to_dict=lambda: {"nats": float("nan"), "path": Path("x"), "shape": (1, 2)})

    library.does = chatty
    done = run(*CONVERT, "--to", "mqa", "--json")
    assert json.loads(done.stdout) == {"nats": None, "path": "x", "shape": [1, 2]}
    assert "Count: 2 layers" in done.stderr and "careful" in done.stderr and "prints" in done.stderr

    quiet = run(*CONVERT, "--to", "mqa", "--json", "--quiet")
    assert json.loads(quiet.stdout) == json.loads(done.stdout)
    assert "Count" not in quiet.stderr and "careful" in quiet.stderr


def test_inspect_prints_a_table_or_json(model: str) -> None:
    table = run("inspect", model)
    assert table.exit_code == 0 and "GQA" in table.stdout and "MQA" in table.stdout and table.stderr == ""
    found = json.loads(run("inspect", model, "--json").stdout)
    # 4 KV heads, keys and values of 8 numbers, 2 bytes, 3 layers
    assert found["cache"]["bytes_per_token"] == 4 * 2 * 8 * 2 * 3


def test_names_from_a_checkpoint_cannot_drive_the_terminal(model: str) -> None:
    config = Path(model) / "config.json"
    config.write_text(json.dumps({"model_type": "\x1b]0;owned\x07\u202e[red]evil"}))
    done = run("inspect", model)
    assert done.exit_code == 2
    assert "\x1b]" not in done.stderr and "\x07" not in done.stderr and "\u202e" not in done.stderr
    assert "[red]evil" in done.stderr


def test_no_color_is_honoured() -> None:
    assert "\x1b[" in shell("convrt", FORCE_COLOR="1", NO_COLOR="", TERM="xterm").stderr
    assert "\x1b[" not in shell("convrt", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm").stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-c", "from headwise.cli import main; main()", "recipes", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0


def test_every_verb_has_help() -> None:
    def verbs(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        return [
            found
            for name, command in group.commands.items()
            for found in (verbs(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)])
        ]

    assert len(verbs(cli)) >= 8
    for verb in verbs(cli):
        done = run(*verb, "--help")
        assert done.exit_code == 0 and "--json" in done.stdout, verb


def test_a_terminal_gets_bars_with_amount_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    ui.configure()
    with ui.progress() as progress:
        progress.stage("Write", total=4_000, unit="bytes")
        progress.advance(4_000, layer="[bold]3")
    assert "Write" in screen.getvalue() and "4 kB of 4 kB" in screen.getvalue()
    assert "layer [bold]3" in screen.getvalue()


def test_lines_come_when_a_stage_is_long_and_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    ui.configure()
    now = [0.0]
    lines = ui._Lines(clock=lambda: now[0])
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


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (4096, "4.1 kB"), (13.5e9, "13.5 GB"), (2.5e15, "2500 TB")]
)
def test_sizes(number: float, text: str) -> None:
    assert format.size(number) == text


@pytest.mark.parametrize(("number", "text"), [(1.25, "1.2 s"), (59, "59 s"), (75, "1:15"), (3700, "1:01:40")])
def test_durations(number: float, text: str) -> None:
    assert format.duration(number) == text


def test_layers_are_listed_as_ranges() -> None:
    assert show.ranges([0, 1, 2, 5]) == "0-2, 5"
    assert show.ranges(range(0, 80, 2)).startswith("40 layers: 0, 2")


@pytest.mark.parametrize("verb", [["recipes", "show"], ["recipes", "validate"], ["uptrain"], ["convert"]])
def test_no_option_stands_twice_in_the_help(verb: list[str]) -> None:
    said = CliRunner().invoke(cli, [*verb, "--help"]).output
    assert said.count("--json") == said.count("--quiet") == 1
