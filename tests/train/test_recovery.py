"""The joint recovery: its stages resume, and it trains on the device that it is given."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.io.reader import open_checkpoint
from headwise.io.tokenizer import load_tokenizer
from headwise.progress import Progress
from headwise.text.blocks import blocks_from
from headwise.train import recovery
from headwise.train.recovery import JointPlan, StageReport, recover_jointly
from headwise.train.student import ModelFolder, Student
from tests import small_parents as models

PLAN = JointPlan(
    tokens=40 * 32, regression_steps=9, kl_steps=8, sequences=4, length=32, sampled_length=32, heldout=6
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    models.converted(models.parent(folder / "parent"), folder / "mla", to="mla", rank=12, rope_dim=4)
    models.text(folder / "text.txt")
    return folder


class Stop(Progress):
    """Stop the run by a signal at the first report of a stage."""

    def __init__(self, stage: int) -> None:
        self.left, self.stage_number = stage, 0

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stage_number += name == "training"

    def advance(self, amount: int = 1, **fields: object) -> None:
        if self.stage_number == self.left:
            self.left = -1
            os.kill(os.getpid(), signal.SIGTERM)


def recover(
    home: Path, work: Path, plan: JointPlan = PLAN, **more: Any
) -> tuple[list[StageReport], dict[str, torch.Tensor]]:
    parent = ModelFolder.of(open_checkpoint(home / "parent"))
    student = Student.load(ModelFolder.of(open_checkpoint(home / "mla")), parent)
    tokenizer = load_tokenizer(home / "parent", "parent")
    blocks = blocks_from(str(home / "text.txt"), tokenizer, length=32, count=46)
    cpu = torch.device("cpu")
    reports = recover_jointly(student, parent, blocks[6:], blocks[:6], plan, work, device=cpu, **more)
    return reports, student.network.state_dict()


def test_recorded_steps_give_the_same_weights(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a recorded step is repeated without a graph: what is left is where gradients are kept."""
    plan = replace(PLAN, sequences=1)
    plain, weights = recover(home, tmp_path / "plain", plan)
    steps, record = [], recovery.record
    monkeypatch.setattr(recovery, "RECORDED_ON", ("cpu",))
    monkeypatch.setattr(recovery, "record", lambda work, device: (steps.append(work), record(work, device))[1])
    recorded, same = recover(home, tmp_path / "recorded", plan)
    assert recorded == plain and len(steps) == 2
    assert all(torch.equal(tensor, weights[name]) for name, tensor in same.items())


def test_a_stage_resumes_from_its_checkpoint(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "CHECKPOINTS", 3)
    whole, weights = recover(home, tmp_path / "whole")
    assert [report.stage for report in whole] == ["regression", "kl"] and any(report.kept for report in whole)
    made: list[Path | None] = []
    resume = recovery.resume
    monkeypatch.setattr(recovery, "resume", lambda trainer, last: (made.append(last), resume(trainer, last)))
    for stage in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            recover(home, tmp_path / "work", progress=Stop(stage))
    trained, resumed = recover(home, tmp_path / "work")
    assert trained == whole
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.items())
    assert made[0] is None and any(last is not None for last in made[1:])
    assert not list((tmp_path / "work").rglob("checkpoint-*"))
    made.clear()
    again, loaded = recover(home, tmp_path / "work")
    assert again == whole and not made, "finished stages are not trained again"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())
