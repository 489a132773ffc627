"""The generated reference pages are current, and list every verb, option, setting and method."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest

from headwise import registry
from headwise._cli.app import Option
from headwise.cli import cli

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(generate: ModuleType) -> None:
    old = [path.name for path, text in generate.make_pages().items() if path.read_text(encoding="utf-8") != text]
    assert not old, "run `make docs`"


def test_every_option_is_on_the_page(generate: ModuleType) -> None:
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    for path, command in generate.verbs(cli):
        section = page.partition(f"## `{path}`\n")[2].partition("\n## ")[0]
        assert section, path
        for param in command.params:
            if isinstance(param, click.Option) and isinstance(param, Option):
                assert (param.opts or param.secondary_opts)[-1] in section or param.name in (
                    "json",
                    "quiet",
                    "verbose",
                )


def test_every_method_is_on_the_page() -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    assert not [m.name for m in registry.METHODS if f"| `{m.name}` | {m.title}. {m.summary} |" not in page]


def test_markers_must_be_there_once(generate: ModuleType) -> None:
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert generate.with_block(page, "x", ["new", ""]) == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"
    with pytest.raises(ValueError, match="markers of 'x'"):
        generate.with_block("a\n", "x", [])
