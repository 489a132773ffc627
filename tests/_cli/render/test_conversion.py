"""A conversion as text for a reader."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from headwise._cli import console
from headwise._cli.render.conversion import quality_statement, render_conversion
from headwise.io.source import EMBEDDED_MODEL
from headwise.models.layout import AttentionLayout
from tests.command_line import run

OLD = AttentionLayout(4, 4, 8, 8, 8)


def test_an_evaluation_that_says_nothing_is_not_proposed() -> None:
    plan = SimpleNamespace(exact=False, model="M", arguments={})
    result: Any = SimpleNamespace(plan=plan, out="OUT", text_loss=None)
    plan.layouts_before = (OLD, replace(OLD, part="encoder", on_text=False))
    plan.layouts_after = (OLD, plan.layouts_before[1].with_groups(2))
    assert quality_statement(result).startswith("Quality not measured: text does not run the layers that changed")
    plan.layouts_before = (OLD, replace(OLD, part="vision", on_text=False))
    plan.layouts_after = (OLD, plan.layouts_before[1].with_groups(2))
    assert quality_statement(result).endswith("headwise eval OUT --baseline M --images FILE.jsonl")
    plan.layouts_before = (replace(OLD, part="decoder"),)
    plan.layouts_after = (plan.layouts_before[0].with_groups(2),)
    assert quality_statement(result).endswith("headwise eval OUT --baseline M --pairs FILE.jsonl")


@pytest.mark.parametrize(
    ("parent", "commands"),
    [
        ("org/name", "headwise eval OUT --baseline org/name"),
        ("my model", "headwise eval OUT --baseline 'my model'"),
        ("a.gguf", "headwise eval OUT --baseline a.gguf"),
    ],
)
def test_a_conversion_ends_with_commands_that_evaluate_it(parent: str, commands: str) -> None:
    layouts = {"layouts_before": (OLD,), "layouts_after": (OLD.with_groups(2),)}
    plan = SimpleNamespace(exact=False, model=parent, arguments={}, **layouts)
    loss = SimpleNamespace(before=2.0, after=2.5, tokens=1024, source="mixture")
    for text_loss in (None, loss):
        result: Any = SimpleNamespace(plan=plan, out="OUT", text_loss=text_loss)
        assert quality_statement(result).endswith(f"easured: run {commands}")


def test_a_conversion_without_norms_ends_with_the_range_of_the_key_residual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = SimpleNamespace(bytes_per_token=64)
    layouts = {"layouts_before": (OLD,), "layouts_after": (OLD.with_groups(2),)}
    sizes = {"cache_before": cache, "cache_after": cache, "disk": 100}
    plan = SimpleNamespace(exact=False, model="M", arguments={}, warnings=[], parts=(), **layouts, **sizes)
    reports = {layer: {"key_residual": value} for layer, value in enumerate((0.3, 0.01, 0.02))}
    result: Any = SimpleNamespace(
        plan=plan, out="OUT", text_loss=None, layers=reports, pushed=None, verification=None
    )
    lines: list[str] = []
    monkeypatch.setattr(console, "note", lines.append)
    render_conversion(result)
    assert lines[1].endswith("Key residual of the 3 layers: smallest 0.0100, median 0.0200, largest 0.3000.")
    lines.clear()
    result.layers = {0: {"key_error": 0.1}}
    render_conversion(result)
    assert lines and not any("residual" in line for line in lines)


@pytest.mark.parametrize("columns", ["80", "100", ""])
def test_a_plan_fits_the_width_and_its_commands_stay_whole(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLA has the longest tensor names, reasons of engines, and commands."""
    monkeypatch.setenv("COLUMNS", columns)
    options = ("--to", "mla", "--cache", "50%", "--calibrate", "none", "--dry-run")
    result = run("convert", str(EMBEDDED_MODEL), "OUT", *options)
    assert result.exit_code == 0, result.stderr
    plan, commands = result.stdout.split("To serve the result:\n")
    lines = plan.splitlines()
    assert max(map(len, lines)) <= int(columns or 100)
    assert not [line for line in lines if line != line.rstrip()]
    rows = [line.split() for line in lines if line.startswith("per token on each of ")]
    assert [(row[5], *row[7:]) for row in rows] == [
        ("2", "2.56", "kB", "2.56", "kB"),
        ("4", "1.28", "kB", "2.56", "kB", "grows", "2x"),
        ("8", "640", "B", "2.56", "kB", "grows", "4x"),
    ]
    assert "5   model.layers.*.self_attn.kv_a_proj_with_mqa.weight" in plan
    assert all(line.startswith(("  python ", "  llama-", "  vllm ", "  pip ")) for line in commands.splitlines())
