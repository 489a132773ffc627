"""The joint recovery: its stages resume, windows compute the parent, and hold the graph of one of them."""

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
from tests import tiny_models

PLAN = JointPlan(
    tokens=40 * 32, regression_steps=9, kl_steps=8, sequences=4, length=32, sampled_length=32, heldout=6
)


WINDOWS = replace(PLAN, windows_steps=PLAN.kl_steps, kl_steps=0)


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


@pytest.mark.parametrize(("plan", "second"), [(PLAN, "kl"), (WINDOWS, "windows")])
def test_a_stage_resumes_from_its_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: JointPlan, second: str
) -> None:
    monkeypatch.setattr(recovery, "CHECKPOINTS", 3)
    whole, weights = recover(home, tmp_path / "whole", plan)
    assert [report.stage for report in whole] == ["regression", second] and any(report.kept for report in whole)
    made: list[Path | None] = []
    resume = recovery.resume
    monkeypatch.setattr(recovery, "resume", lambda trainer, last: (made.append(last), resume(trainer, last)))
    for stage in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            recover(home, tmp_path / "work", plan, progress=Stop(stage))
    trained, resumed = recover(home, tmp_path / "work", plan)
    assert trained == whole
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.items())
    assert made[0] is None and any(last is not None for last in made[1:])
    assert not list((tmp_path / "work").rglob("checkpoint-*"))
    made.clear()
    again, loaded = recover(home, tmp_path / "work", plan)
    assert again == whole and not made, "finished stages are not trained again"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


def errors_in_windows(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The mean error of the windows in every step."""
    errors: list[float] = []
    compute = recovery.WindowTrainer.compute_gradients

    def watched(self: Any, *given: Any, **options: Any) -> torch.Tensor:
        loss = compute(self, *given, **options)
        errors.append(float(loss))
        return loss

    monkeypatch.setattr(recovery.WindowTrainer, "compute_gradients", watched)
    return errors


def run_windows(student: Path, parent: Path, work: Path, steps: int = 2, **more: Any) -> list[StageReport]:
    """Train the student of a parent on noise: a step of regression, then some in windows."""
    plan = JointPlan(0, 1, 0, steps, sequences=1, length=16, sampled_length=16, heldout=2)
    tokens = torch.randint(3, tiny_models.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))
    folder = ModelFolder.of(open_checkpoint(parent))
    trained = Student.load(ModelFolder.of(open_checkpoint(student)), folder)
    return recover_jointly(trained, folder, tokens, tokens[:2], plan, work, device=torch.device("cpu"), **more)


@pytest.mark.parametrize(
    "model_type",
    [
        *(
            "llama",
            "gemma2",
            "gemma3_text",
            "gpt_neox",
            "falcon",
            "cohere2",
            "smollm3",
            "phi",
            "granite",
            "gpt_oss",
        ),
        *("mixtral", "lfm2", "qwen3_next", "gemma3"),
    ],
)
def test_windows_of_a_student_that_is_its_parent_have_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Layers with a window or without, of local and of global positions, with other types between them."""
    monkeypatch.setattr(recovery.WindowTrainer, "longest", 2)
    errors = errors_in_windows(monkeypatch)
    parent = tiny_models.save(model_type, tmp_path / "parent")
    reports = run_windows(parent, parent, tmp_path / "work")
    assert errors == [0.0, 0.0] and all(report.before == report.after for report in reports)


def test_windows_of_an_exact_mla_student_have_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of the student's layers are its own: its rotary keys have another width than the parent's."""
    errors = errors_in_windows(monkeypatch)
    parent = models.parent(tmp_path / "parent", vocab_size=tiny_models.VOCABULARY, rms_norm_eps=1e-5)
    run_windows(models.converted(parent, tmp_path / "mla", to="mla", exact=True), parent, tmp_path / "work", 1)
    assert len(errors) == 1 and 0 < errors[0] < 1e-8


def test_windows_lower_the_error_of_attention_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = errors_in_windows(monkeypatch)
    student = Student.load(
        ModelFolder.of(open_checkpoint(home / "mla")), ModelFolder.of(open_checkpoint(home / "parent"))
    )
    start = student.network.state_dict()
    plan = replace(WINDOWS, regression_steps=0, windows_steps=40)
    (report,), weights = recover(home, tmp_path / "work", plan)
    assert sum(errors[-16:]) < 0.7 * sum(errors[:16])
    assert report.stage == "windows" and report.kept and report.after is not None and report.after < report.before
    changed = {name for name in weights if not torch.equal(weights[name], start[name])}
    assert changed and all(".self_attn." in name for name in changed)


def test_the_graph_of_one_window_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd holds at its peak grows with the layers of a window, not with those of the model."""
    parents = {n: tiny_models.save("llama", tmp_path / f"{n}", num_hidden_layers=n) for n in (4, 8)}

    class Held:
        """A saved tensor that is counted while autograd holds it."""

        now = peak = 0

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            Held.now += tensor.nbytes
            Held.peak = max(Held.peak, Held.now)

        def __del__(self) -> None:
            Held.now -= self.tensor.nbytes

    def peak(layers: int, window: int) -> int:
        monkeypatch.setattr(recovery.WindowTrainer, "longest", window)
        Held.now = Held.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            run_windows(parents[layers], parents[layers], tmp_path / f"work-{layers}-{window}", 1)
        assert Held.now == 0
        return Held.peak

    one = peak(4, 4)
    assert one > 0 and peak(8, 4) == one and peak(8, 8) > 1.9 * one


def test_windows_have_nearly_one_length() -> None:
    assert recovery.even_runs([*range(8)], 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert recovery.even_runs([*range(5)], 4) == [[0, 1, 2], [3, 4]]
    assert recovery.even_runs([1, 3], 1) == [[1], [3]]
    assert [len(run) for run in recovery.even_runs([*range(30)], 4)] == [4] * 6 + [3] * 2


@pytest.mark.parametrize(("steps", "rate"), [(50, 0.005), (1000, 0.1), (2000, 0.1)])
def test_a_short_regression_of_mla_takes_small_steps(
    home: Path, tmp_path: Path, steps: int, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: dict[str, float] = {}
    monkeypatch.setattr(recovery, "_run_stage", lambda stage, steps, rate, *rest: rates.update({stage: rate}))
    recover(home, tmp_path, replace(PLAN, regression_steps=steps))
    assert rates["regression"] == pytest.approx(rate) and rates["kl"] == recovery.KL_RATE["mla"]
