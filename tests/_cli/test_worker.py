"""The process of a distributed run: exit codes and messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise._cli import worker


def test_a_wrong_setting_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = {"model": "m", "out": str(tmp_path / "out"), "settings": ["train.tokns=1"]}
    assert worker.run_worker(json.dumps(arguments)) == 2
    shown = capsys.readouterr()
    assert "Did you mean train.tokens?" in " ".join(shown.err.split()) and not shown.out
    assert not list(tmp_path.iterdir())
