"""The demo: its conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headwise.demo.demo import demo, trials
from headwise.errors import SettingError


def test_every_target_is_made_by_every_method() -> None:
    made = [(trial.target, trial.method) for trial in trials(8)]
    merged = [(t, m) for t in ("GQA-4", "GQA-2", "MQA") for m in ("mean", "optimal")]
    merged[4:4] = [("GQA-2", "optimal + refit"), ("GQA-2", "refit + uptrain")]
    assert made == merged + [(f"MLA -{share}%", "MLA") for share in ("68.8", "75", "87.5")]
    assert [trial.arguments["groups"] for trial in trials(4) if "groups" in trial.arguments] == [2, 2, 1, 1, 1, 1]
    assert not list(trials(1))


@pytest.mark.parametrize(
    "options",
    [{"device": "abacus"}, {"seed": -1}, {"model": ""}, {"quick": "yes"}],
    ids=lambda given: next(iter(given)),
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as caught:
        demo(tmp_path / "out", **options)
    assert caught.value.field == next(iter(options)) and not (tmp_path / "out").exists()
