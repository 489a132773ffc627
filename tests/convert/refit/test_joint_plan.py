"""What a joint refit does, decided from headers, settings and free memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headwise.convert.pipeline import convert_model
from headwise.convert.refit import joint_plan
from headwise.convert.settings import ConvertSettings
from headwise.errors import SettingError
from headwise.io.reader import open_checkpoint
from headwise.models.protocol import find_attention_model
from headwise.train.recovery import JointPlan
from tests.convert.refit.conftest import PLAN


def test_more_text_takes_larger_steps_and_more_of_them() -> None:
    assert joint_plan.scaled_plan(PLAN, None) == PLAN and joint_plan.scaled_plan(PLAN, PLAN.tokens) == PLAN
    larger = joint_plan.scaled_plan(joint_plan.JointPlan(4_000_000, 1000, 300), 16_000_000)
    assert larger == joint_plan.JointPlan(16_000_000, 1000, 900, sequences=4)


def test_less_text_takes_fewer_steps_where_it_would_be_read_too_often() -> None:
    plan = JointPlan(4_000_000, 1000, 900)
    assert joint_plan.scaled_plan(plan, 3_900_000) == replace(plan, tokens=3_900_000, regression_steps=984)
    assert joint_plan.scaled_plan(plan, 2_000_000) == JointPlan(2_000_000, 505, 505)
    assert joint_plan.scaled_plan(plan, 1) == JointPlan(1, 1, 1)
    # Few steps for much text.
    assert joint_plan.scaled_plan(JointPlan(4_000_000, 60, 20), 400_000) == JointPlan(400_000, 60, 20)


def test_wide_models_use_more_of_a_gpu(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(parent)
    arch, width = find_attention_model(checkpoint.config), checkpoint.config["hidden_size"]
    target: Any = SimpleNamespace(layouts=arch.layouts(checkpoint.config))

    def seconds(narrow: float) -> float:
        monkeypatch.setattr(joint_plan, "NARROW", narrow)
        return joint_plan.joint_seconds(checkpoint, arch, target, PLAN, [torch.device("cuda")])

    assert seconds(width) == seconds(2 * width) == pytest.approx(2 * seconds(width / 2))
    least = max(slow / fast for slow, fast in (joint_plan.TRAINING_FLOPS, joint_plan.SAMPLING_FLOPS))
    assert seconds(width / 1000) > 0.5 * least * seconds(width)


@pytest.mark.parametrize(
    ("length", "sequences", "kept", "sampled"),
    [
        (4096, 3, 4096, 1024),
        (8192, 2, 8192, 1024),
        (2048, 6, 2048, 1024),
        (5000, 3, 4096, 1024),
        (100, 123, 100, 100),
    ],
)
def test_another_length_keeps_the_tokens_of_a_step(length: int, sequences: int, kept: int, sampled: int) -> None:
    plan = joint_plan.with_length(joint_plan.JointPlan(4_000_000, 1000, 300), length)
    assert (plan.sequences, plan.length, plan.sampled_length) == (sequences, kept, sampled)


def test_a_length_beyond_the_context_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"`refit_length` is 33 tokens, and the context of .* is 32"):
        convert_model(parent, tmp_path / "out", to="mqa", refit="joint", refit_length=33, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_context_longer_than_the_training_is_a_warning(parent: Path, tmp_path: Path) -> None:
    short, whole = (
        convert_model(parent, tmp_path / "out", to="mqa", refit="joint", refit_length=n, device="cpu", dry_run=True)
        for n in (16, 32)
    )
    assert any("`refit_length` 32 trains on all of it" in warning for warning in short.warnings)
    assert not any("refit_length" in warning for warning in whole.warnings)


def plan_on(
    parent: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, device: str = "cuda", **given: Any
) -> joint_plan.JointPlan | None:
    """The joint refit of a conversion to MQA on a device with so much free memory."""
    monkeypatch.setattr(joint_plan, "available_memory", lambda device: free)
    checkpoint = open_checkpoint(parent)
    arch = find_attention_model(checkpoint.config)
    target: Any = SimpleNamespace(
        calibrated=True,
        exact=False,
        layouts=arch.layouts(checkpoint.config),
        converted_names=lambda layer: ("k",),
        config=checkpoint.config,
        outputs=list(checkpoint.tensors.values()),
    )
    before, devices = given.pop("before", None), [torch.device(device)] * given.pop("devices", 1)
    settings = ConvertSettings(**{"to": "mqa", **given})
    return joint_plan.plan_joint(checkpoint, arch, target, settings, devices, before)


def test_windows_replace_kl_where_the_whole_backward_pass_does_not_fit(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least memory comes last: all sequences at once, one after the other, then windows in the same order."""
    monkeypatch.setattr(joint_plan, "WINDOW", 1)
    monkeypatch.setattr(joint_plan, "MEASURED_AT_ONCE", 0)  # it would outweigh a tiny model
    needed: list[int] = []
    memory = joint_plan.joint_memory
    monkeypatch.setattr(joint_plan, "joint_memory", lambda *given: needed.append(memory(*given)) or needed[-1])
    plan = plan_on(parent, monkeypatch, None, refit="joint")
    assert plan == PLAN and needed == sorted(needed, reverse=True) and len(set(needed)) == 4
    windows = replace(PLAN, windows_steps=PLAN.kl_steps, kl_steps=0)
    expected = [PLAN, replace(PLAN, one_by_one=True), windows, replace(windows, one_by_one=True)]
    for refit in ("joint", "auto"):
        assert [plan_on(parent, monkeypatch, free, refit=refit) for free in needed[:4]] == expected
    assert plan_on(parent, monkeypatch, needed[0], refit="windows") == windows
    # A resumed run keeps its stages, however much is free by then.
    kept = plan_on(parent, monkeypatch, needed[0], refit="joint", before=asdict(windows))
    assert kept == windows
    assert plan_on(parent, monkeypatch, needed[3] - 1, refit="auto") is None
    with pytest.raises(SettingError, match=r"`refit` joint takes about .* even in windows of 1 layers"):
        plan_on(parent, monkeypatch, needed[3] - 1, refit="joint")


@pytest.mark.parametrize(
    ("refit", "reason"), [("joint", "because a backward pass"), ("windows", "as `refit` sets")]
)
def test_the_plan_says_why_it_trains_in_windows(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: str, reason: str
) -> None:
    memory = joint_plan.joint_memory
    monkeypatch.setattr(
        joint_plan, "joint_memory", lambda *given: memory(*given) + (10**15 if given[2].kl_steps else 0)
    )
    plan = convert_model(parent, tmp_path / "out", to="mqa", refit=refit, device="cpu", dry_run=True)
    assert any(f"4 in windows of 4 layers, {reason}" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"to": "mqa"}, True),
        ({"to": "mqa", "calibrate": "mixture"}, True),
        ({"to": "mqa", "calibrate": "none"}, False),
        ({"to": "mqa", "moments": "folder"}, False),
        ({"to": "mqa", "images": "pairs.jsonl"}, False),
        ({"to": "mla", "sparse": "dsa"}, False),
    ],
)
def test_auto_chooses_a_joint_refit_where_the_settings_allow_one(
    parent: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], chosen: bool
) -> None:
    assert (plan_on(parent, monkeypatch, None, **given) is not None) == chosen


def test_an_interrupted_run_keeps_its_steps_on_other_devices(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in a step: two devices take four, in fewer steps, and one goes on with four."""
    monkeypatch.setattr(joint_plan, "GPU_PLAN", replace(PLAN, regression_steps=1000, kl_steps=800, sequences=3))

    def planned(devices: int, before: JointPlan | None = None) -> JointPlan:
        recorded = asdict(before) if before else None
        plan = plan_on(parent, monkeypatch, None, refit="joint", devices=devices, before=recorded)
        assert plan is not None
        return plan

    one, two = planned(1), planned(2)
    assert (one.sequences, two.sequences) == (3, 4) and planned(3) == one and planned(4) == two
    assert (two.regression_steps, two.kl_steps) == (750, 600)
    assert planned(1, two) == planned(3, two) == two and planned(2, one) == one
    counts = [
        joint_plan.training_processes(plan, [torch.device("cuda")] * n) for plan in (one, two) for n in range(1, 5)
    ]
    assert counts == [1, 1, 3, 3, 1, 2, 2, 4]


def test_auto_keeps_what_the_interrupted_run_decided(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes on other devices, and however short."""
    assert plan_on(parent, monkeypatch, None) == PLAN and plan_on(parent, monkeypatch, None, before={}) is None
    monkeypatch.setattr(joint_plan, "REFIT_SECONDS", 0.0)
    assert plan_on(parent, monkeypatch, None) is None
    assert plan_on(parent, monkeypatch, None, before=asdict(PLAN)) == PLAN
