"""The jobs that are put through faults: tiny models, real conversions."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headwise.convert.pipeline import convert_model
from headwise.io.writer import Writer
from tests.convert.speaking import TEXT, save_speaking
from tests.faults.harness import World

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
POOLED = {"to": "gqa", "groups": 2, "method": "mean", "calibrate": "none", "refit": "off", "verify": False}
KINDS: dict[str, dict[str, Any]] = {
    "mean": POOLED,
    "optimal": {"to": "gqa", "groups": 2, **TEXT, "refit": "off"},
    "refit": {"to": "gqa", "groups": 2, **TEXT, "refit": 2},
    "mla": {"to": "mla", "rank": 8, "rope_dim": 2, **TEXT, "refit": "off"},
}


def make(home: Path, scenario: str = "fresh", kind: str = "mean") -> World:
    """A world in `home`.

    Args:
        scenario: "fresh": nothing is there; "replace": an older OUT is, and --force is given; "resume": a run was
            interrupted half way.
        kind: which conversion.
    """
    source = save_speaking(home / "source", **SHAPE)
    options = {**KINDS[kind], "max_shard_size": 6000, "force": scenario == "replace"}

    def job(out: Path, resume: bool) -> Any:
        return convert_model(source, out, resume=resume, **options)

    kept = home / "kept"
    if scenario == "replace":
        convert_model(source, kept, to="gqa", groups=1, method="mean", calibrate="none", verify=False)
        return World(home, source, job, partial(_lay, kept))
    if scenario == "resume":
        interrupt(source, home / "target" / "out", options)
        work = home / "target" / ".out.headwise-work"
        shutil.copytree(work, kept)
        return World(home, source, job, lambda out: _lay(kept, work))
    return World(home, source, job)


def _lay(kept: Path, place: Path) -> None:
    shutil.copytree(kept, place)


def interrupt(source: Path, out: Path, options: dict[str, Any]) -> None:
    """Stop a conversion when half of its tensors are written."""
    calls = 0
    copy = Writer.copy

    def stop(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        copy(self, *arguments)

    os.makedirs(out.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "copy", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_model(source, out, **options)
