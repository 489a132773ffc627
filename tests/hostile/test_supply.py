"""What comes from outside: no network unless the Hub is named, no code of a checkpoint, pinned versions."""

from __future__ import annotations

import ast
import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

import headwise
from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from tests.convert.speaking import TEXT, save_speaking
from tests.hostile import audit

PACKAGE = Path(headwise.__file__).parent
ROOT = PACKAGE.parent


def test_no_socket_is_opened_for_a_local_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError(f"network: {arguments}")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model = save_speaking(tmp_path / "model")
    inspect_model(model, context=64)
    grouped, latent = {"to": "gqa", "groups": 2, "refit": 2, **TEXT}, {"to": "mla", "exact": True}
    for number, options in enumerate((grouped, latent)):
        out = tmp_path / f"out{number}"
        convert_model(model, out, **options)
        assert verify_model(out, model).passed and verify_model(out, hashes=True).passed


def test_whatever_is_loaded_is_loaded_without_its_code() -> None:
    """A library that finds code beside a model asks the user, unless it is told not to trust it."""
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            told = {keyword.arg: keyword.value for keyword in node.keywords}
            trusting = told.get("trust_remote_code")
            assert trusting is None or ast.unparse(trusting) == "False", f"{path}:{node.lineno}"
            called = ast.unparse(node.func)
            if called.endswith(".from_pretrained") and re.search("Auto|auto_class|getattr", called):
                found += 1
                assert trusting is not None, f"{path}:{node.lineno} leaves trust_remote_code open"
    assert found > 5


def test_every_dependency_is_pinned() -> None:
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if line}
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines if line)
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [item for group in groups for item in group]
    names = {re.split(r"[\[<>=;, ]", item)[0].lower().replace("_", "-") for item in wanted} - {"headwise"}
    assert not names - pinned, f"not pinned: {names - pinned}"


SOUND = {"name": "a", "version": "1", "vulns": []}
HOLED = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ([SOUND, UNKNOWN], 0, "1 of 2 pins audited, 0 with"),
        ([SOUND, HOLED], 1, "b 2: CVE-1, mended in 2.1"),
        ([UNKNOWN, UNKNOWN], 0, "Nothing was audited"),
        ("requests.exceptions.ConnectionError: HTTPSConnectionPool", 0, "Nothing was audited"),
        ("pip_audit: error: unrecognized arguments", 1, ""),
    ],
)
def test_an_audit_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Any, code: int, words: str
) -> None:
    printed = ("", answer) if isinstance(answer, str) else (json.dumps({"dependencies": answer}), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, *printed))
    assert audit.main() == code
    assert words in capsys.readouterr().out
