"""The process of a distributed run: exit codes and messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise._cli import worker


def test_a_wrong_setting_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["distill", str(tmp_path / "out"), "--model", "m"]
    assert worker.run_worker([*words, "--set", "train.tokns=1"]) == 2
    shown = capsys.readouterr()
    assert "Did you mean train.tokens?" in " ".join(shown.err.split()) and not shown.out
    with pytest.raises(SystemExit, match="2"):
        worker.run_worker(words[:2])
    assert "--model" in capsys.readouterr().err
