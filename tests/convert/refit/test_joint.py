"""The joint refit of a conversion: one sampled text, two stages, the same bytes again, and nothing made worse."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert.calibration import corpus
from headwise.convert.calibration.corpus import NUM_HELDBACK, SAMPLED
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.refit import joint
from headwise.convert.settings import ConvertSettings
from headwise.errors import SettingError
from headwise.io.reader import open_checkpoint
from headwise.models.protocol import find_attention_model
from headwise.train import recovery
from headwise.train.recovery import JointPlan
from tests import small_parents
from tests.convert.speaking import save_speaking

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
TARGETS: dict[str, dict[str, Any]] = {
    "mqa": {"to": "mqa"},
    "mla": {"to": "mla", "rank": 12, "rope_dim": 4},
}


@pytest.fixture(autouse=True)
def small_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "CPU_PLAN", PLAN)
    monkeypatch.setattr(joint, "GPU_PLAN", PLAN)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_parents.parent(tmp_path_factory.mktemp("joint") / "parent", max_position_embeddings=32)


def convert(parent: Path, out: Path, kind: str, **settings: Any) -> ConvertResult:
    settings = {"refit": "joint", "calibrate": SAMPLED, "calibration_tokens": 100, "device": "cpu"} | settings
    done = convert_model(parent, out, **TARGETS[kind], **settings)
    assert isinstance(done, ConvertResult)
    return done


@pytest.mark.parametrize(("kind", "refit"), [("mqa", "joint"), ("mla", "joint"), ("mla", "windows")])
def test_both_stages_are_recorded_and_the_result_is_verified(
    parent: Path, tmp_path: Path, kind: str, refit: str
) -> None:
    plain = convert(parent, tmp_path / "plain", kind, refit="off")
    done = convert(parent, tmp_path / "a", kind, refit=refit)
    assert [stage["stage"] for stage in done.refit] == ["regression", "windows" if refit == "windows" else "kl"]
    assert f"--refit {refit} " in json.loads((done.out / "headwise.json").read_text())["command"]
    assert done.refit[0]["after" if done.refit[0]["kept"] else "before"] == pytest.approx(done.refit[1]["before"])
    assert done.verification is not None and done.verification.passed
    before, after = (load_file(each.out / "model.safetensors") for each in (plain, done))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("self_attn" in name for name in changed)
    again = convert(parent, tmp_path / "b", kind, refit=refit)
    assert again.refit == done.refit
    repeated = load_file(again.out / "model.safetensors")
    assert all(torch.equal(after[name], repeated[name]) for name in after)


def test_the_target_is_the_output_of_the_normed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a source with norms on queries and keys: the linear maps begin near it, and training lowers the error."""
    monkeypatch.setattr(joint, "CPU_PLAN", replace(PLAN, tokens=32 * 64, regression_steps=40))
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    parent = save_speaking(tmp_path / "parent", model_type="qwen3", **heads)
    done = convert(parent, tmp_path / "out", "mla", calibration_tokens=32 * 24)
    regression = done.refit[0]
    assert done.verification is not None and done.verification.passed
    assert all(report["key_residual"] > 0 for report in done.layers.values())
    assert all(report["output"]["before"] < 0.5 for report in done.layers.values())
    assert regression["kept"] and regression["after"] < regression["before"]


def test_more_text_takes_larger_steps_and_more_of_them() -> None:
    assert joint.scaled_plan(PLAN, None) == PLAN and joint.scaled_plan(PLAN, PLAN.tokens) == PLAN
    assert joint.scaled_plan(PLAN, 100) == replace(PLAN, tokens=100)
    larger = joint.scaled_plan(joint.JointPlan(4_000_000, 1000, 300), 16_000_000)
    assert larger == joint.JointPlan(16_000_000, 1000, 900, sequences=4)


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
    plan = joint.with_length(joint.JointPlan(4_000_000, 1000, 300), length)
    assert (plan.sequences, plan.length, plan.sampled_length) == (sequences, kept, sampled)


def test_a_length_beyond_the_context_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"`refit_length` is 33 tokens, and the context of .* is 32"):
        convert(parent, tmp_path / "out", "mqa", refit_length=33)
    assert not (tmp_path / "out").exists()


def test_training_reads_long_sequences_with_repeats_and_measures_plain_text(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "CPU_PLAN", replace(PLAN, sampled_length=16, repeats=0.5))
    read: list[torch.Tensor] = []
    recover = joint.recover_jointly

    def watched(student: Any, folder: Any, rows: Any, heldout: Any, *others: Any, **options: Any) -> Any:
        read.extend((rows, heldout))
        return recover(student, folder, rows, heldout, *others, **options)

    joined: list[torch.Tensor] = []
    repeat = joint.repeat_passages
    monkeypatch.setattr(joint, "recover_jointly", watched)
    monkeypatch.setattr(joint, "repeat_passages", lambda rows, *by: joined.append(rows) or repeat(rows, *by))
    convert(parent, tmp_path / "out", "mqa")
    rows, heldout = read
    assert rows.shape == (24, 32) and heldout.shape == (4, 16)
    assert 0 < int((rows != joined[0]).any(1).sum()) <= 12


def test_a_context_longer_than_the_training_is_a_warning(parent: Path, tmp_path: Path) -> None:
    short, whole = (
        convert_model(parent, tmp_path / "out", to="mqa", refit="joint", refit_length=n, device="cpu", dry_run=True)
        for n in (16, 32)
    )
    assert any("`refit_length` 32 trains on all of it" in warning for warning in short.warnings)
    assert not any("refit_length" in warning for warning in whole.warnings)


def test_a_stage_that_makes_it_worse_is_undone(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "REGRESSION_RATE", 1e4)
    monkeypatch.setattr(recovery, "KL_RATE", {"mla": 1e4, "gqa": 1e4})
    plain = convert(parent, tmp_path / "plain", "mqa", refit="off", calibrate="builtin")
    done = convert(parent, tmp_path / "out", "mqa", calibrate="builtin")
    assert [stage["kept"] for stage in done.refit] == [False, False]
    before, after = (load_file(each.out / "model.safetensors") for each in (plain, done))
    # The student holds the tensors in float32, as the folder does, so nothing is rounded.
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_calibration_reads_the_text_of_the_refit(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    sample = joint.sample_tokens

    def counted(*arguments: Any, **options: Any) -> Any:
        drawn.append(options["sequences"])
        return sample(*arguments, **options)

    monkeypatch.setattr(joint, "sample_tokens", counted)
    monkeypatch.setattr(corpus, "sample_tokens", counted)
    read: list[torch.Tensor] = []
    monkeypatch.setattr(joint, "keep_corpus", lambda *given: read.append(given[2]) or corpus.keep_corpus(*given))
    convert(parent, tmp_path / "out", "mqa")
    assert drawn == [PLAN.num_sampled + PLAN.heldout]
    assert read[0].shape == (100 // 32 + NUM_HELDBACK, 32)
    assert open_checkpoint(tmp_path / "out").config["num_key_value_heads"] == 1


def plan_on(
    parent: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, device: str = "cuda", **given: Any
) -> joint.JointPlan | None:
    """The joint refit of a conversion to MQA on a device with so much free memory."""
    monkeypatch.setattr(joint, "available_memory", lambda device: free)
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
    before = given.pop("before", None)
    settings = ConvertSettings(**{"to": "mqa", **given})
    return joint.plan_joint(checkpoint, arch, target, settings, torch.device(device), before)


def test_windows_replace_kl_where_the_whole_backward_pass_does_not_fit(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least memory comes last: all sequences at once, one after the other, then windows in the same order."""
    monkeypatch.setattr(joint, "WINDOW", 1)
    monkeypatch.setattr(joint, "MEASURED_AT_ONCE", 0)  # it would outweigh a tiny model
    needed: list[int] = []
    memory = joint.joint_memory
    monkeypatch.setattr(joint, "joint_memory", lambda *given: needed.append(memory(*given)) or needed[-1])
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
    ("refit", "reason"), [("joint", "because a backward pass"), ("windows", "as `refit` asks")]
)
def test_the_plan_says_why_it_trains_in_windows(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: str, reason: str
) -> None:
    memory = joint.joint_memory
    monkeypatch.setattr(joint, "joint_memory", lambda *given: memory(*given) + (10**15 if given[2].kl_steps else 0))
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
