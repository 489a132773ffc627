"""docs/reference/json.md and what --json prints say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from headwise.demo.demo import DemoResult
from headwise.demo.picture import Measurement
from headwise.environment import environment
from headwise.eval.bench import BenchResult, DecodeSpeed
from headwise.eval.report.card_section import CardUpdate
from headwise.format import plain
from headwise.recipes.run import UptrainResult
from headwise.records.push import PushResult
from tests.convert.speaking import save_speaking

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "json.md"
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def documented() -> dict[str, dict[str, str]]:
    """Verb -> key -> type, from the page's tables."""
    sections = re.split(r"^## `headwise (.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = re.compile(r"^\| `([^`]+)` \| (\w+\??) \|", re.MULTILINE)
    return {verb: dict(rows.findall(text)) for verb, text in zip(sections[1::2], sections[2::2], strict=True)}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value with its path and JSON type; an empty array or object has no leaves."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path, TYPES[type(value)]


def pattern(key: str) -> re.Pattern[str]:
    """What a documented key stands for. A part that is `null` as a whole has no keys of its own."""
    text = re.escape(key).replace(r"\.\*\*", r"(?:[.\[].*)?").replace(r"\*", ".+")
    return re.compile(text)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("json")
    model = save_speaking(home / "model")
    asked = {"to": "gqa", "groups": 4, "calibrate": "none"}
    plan = convert_model(model, home / "out", **asked, dry_run=True)
    speed = DecodeSpeed("m", 1, 8, 1.0, 1.0, 1.0, 1, 1, None)
    measured = Measurement("GQA-4", "mean", 1, 1.0, 1.0)
    pushed = PushResult(home, "org/name", None, {"config.json": 3}, ("old.safetensors",), True, True, False)
    results = {
        "inspect": inspect_model(model, context=64),
        "convert --dry-run": plan,
        "convert": convert_model(model, home / "out", **asked),
        "uptrain": UptrainResult(home, "distill", 3.0, 2.0, None, 1, 1.0, {0: {"before": 0.1}}),
        "verify": verify_model(home / "out"),
        "bench": BenchResult([speed], [speed, speed], 1, "cpu"),
        "card": CardUpdate(home, 1, (home,)),
        "push": pushed,
        "demo": DemoResult("m", 1, measured, (measured,), home),
        "env": environment(),
    }
    return {verb: json.loads(json.dumps(plain(result), allow_nan=False)) for verb, result in results.items()}


@pytest.mark.parametrize("verb", documented())
def test_every_key_is_documented_with_its_type(printed, verb):
    rows = documented()[verb]
    for path, kind in leaves(printed[verb]):
        found = [wanted for key, wanted in rows.items() if pattern(key).fullmatch(path)]
        assert found, f"{verb}: {path} is not documented"
        optional, wanted = found[0].endswith("?"), found[0].rstrip("?")
        assert (
            wanted in ("any", kind) or (optional and kind == "null") or (wanted, kind) == ("number", "integer")
        ), path


@pytest.mark.parametrize("verb", documented())
def test_every_documented_key_is_there(printed, verb):
    keys = re.compile(r"\.\*\*|\.\*|\[\]")
    for key in documented()[verb]:
        here = [printed[verb]]
        for name in keys.sub("", key).split(".") if key != "*" else ():
            here = [inner for value in here for inner in (value if isinstance(value, list) else [value])]
            assert all(name in value for value in here), f"{verb}: {key} is documented and not printed"
            here = [value[name] for value in here]


def test_every_verb_is_on_the_page():
    from headwise.cli import cli

    text = PAGE.read_text(encoding="utf-8")
    assert not [verb for verb in cli.commands if verb != "recipes" and f"`headwise {verb}" not in text]
