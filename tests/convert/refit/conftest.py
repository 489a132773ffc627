"""A parent and a plan that a CPU trains in seconds, in place of those of every device."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.convert.refit import joint_plan
from headwise.train.recovery import JointPlan
from tests import small_parents

# Text is sampled in pieces of half a sequence.
PLAN = JointPlan(
    tokens=32 * 24,
    regression_steps=6,
    kl_steps=4,
    sequences=4,
    length=32,
    sampled_length=32,
    repeats=0.0,
    heldout=4,
)


@pytest.fixture(autouse=True)
def small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_plan, "CPU_PLAN", PLAN)
    monkeypatch.setattr(joint_plan, "GPU_PLAN", PLAN)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_parents.parent(tmp_path_factory.mktemp("joint") / "parent", max_position_embeddings=32)
