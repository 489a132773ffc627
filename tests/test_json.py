"""docs/reference/json.md and record.md list the keys of every object of --json and of headwise.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.sample import SampleResult
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

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
PAGE = REFERENCE / "json.md"
RECORD = "headwise.json"
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def documented() -> dict[str, dict[str, str]]:
    """Return the types of the keys, by verb, from the tables of the pages; the record is one more object."""
    sections = re.split(r"^## `headwise (.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = re.compile(r"^\| `([^`]+)` \| (\w+\??) \|", re.MULTILINE)
    verbs = {verb: dict(rows.findall(text)) for verb, text in zip(sections[1::2], sections[2::2], strict=True)}
    return verbs | {RECORD: dict(rows.findall((REFERENCE / "record.md").read_text(encoding="utf-8")))}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value's path and JSON type; an empty array or object has no leaves."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path, TYPES[type(value)]


def pattern(key: str) -> re.Pattern[str]:
    """Return the paths of a documented key, as an expression."""
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
    pushed = PushResult(
        home,
        "org/name",
        None,
        {"config.json": 3},
        ("old.safetensors",),
        ("other.json",),
        True,
        ("loading",),
        True,
        False,
    )
    results = {
        "inspect": inspect_model(model, context=64),
        "convert --dry-run": plan,
        "convert": convert_model(model, home / "out", **asked),
        "uptrain": UptrainResult(home, "distill", 3.0, 2.0, None, 1, 1.0, {0: {"before": 0.1}}, None),
        "sample": SampleResult(home / "a.jsonl", 3, 700, 0),
        "verify": verify_model(home / "out"),
        "bench": BenchResult([speed], [speed, speed], 1, "cpu"),
        "card": CardUpdate(home, 1, (home,)),
        "push": pushed,
        "demo": DemoResult("m", 1, measured, (measured,), home),
        "env": environment(),
    }
    objects = {verb: json.loads(json.dumps(plain(result), allow_nan=False)) for verb, result in results.items()}
    return objects | {RECORD: json.loads((home / "out" / RECORD).read_text(encoding="utf-8"))}


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
    for key in documented()[verb]:
        values = [printed[verb]]
        for part in key.split("."):
            name = part.removesuffix("[]").removesuffix("[]")
            if name in ("*", "**"):
                values = [inner for value in values for inner in (value or {}).values()] if name == "*" else values
                continue
            assert all(name in value for value in values), f"{verb}: {key} is documented and not printed"
            values = [value[name] for value in values]
            for _ in range(part.count("[]")):
                values = [inner for value in values for inner in value]


def test_every_verb_is_on_the_page():
    from headwise.cli import cli

    text = PAGE.read_text(encoding="utf-8")
    assert not [verb for verb in cli.commands if verb != "recipes" and f"`headwise {verb}" not in text]
