"""The joint refit of a conversion: one sampled text, two stages, the same bytes again, and nothing made worse."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert.calibration import corpus
from headwise.convert.calibration.corpus import NUM_HELDBACK, SAMPLED
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.refit import joint, joint_plan
from headwise.io.reader import open_checkpoint
from headwise.train import recovery
from tests.convert.refit.conftest import PLAN
from tests.convert.speaking import save_speaking

TARGETS: dict[str, dict[str, Any]] = {
    "mqa": {"to": "mqa"},
    "mla": {"to": "mla", "rank": 12, "rope_dim": 4},
}


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
    monkeypatch.setattr(joint_plan, "CPU_PLAN", replace(PLAN, tokens=32 * 64, regression_steps=40))
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    parent = save_speaking(tmp_path / "parent", model_type="qwen3", **heads)
    done = convert(parent, tmp_path / "out", "mla", calibration_tokens=32 * 24)
    regression = done.refit[0]
    assert done.verification is not None and done.verification.passed
    assert all(report["key_residual"] > 0 for report in done.layers.values())
    assert all(report["output"]["before"] < 0.5 for report in done.layers.values())
    assert regression["kept"] and regression["after"] < regression["before"]


def test_training_reads_long_sequences_with_repeats_and_measures_plain_text(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint_plan, "CPU_PLAN", replace(PLAN, sampled_length=16, repeats=0.5))
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


@pytest.mark.parametrize(("kind", "refit"), [("mla", "joint"), ("mqa", "windows")])
def test_two_processes_train_as_one_does(parent: Path, tmp_path: Path, kind: str, refit: str) -> None:
    """Each reads half of the sequences of a step; sums of other order make the only difference."""
    one, two = (
        convert(parent, tmp_path / device, kind, refit=refit, device=device) for device in ("cpu", "cpu,cpu")
    )
    assert not multiprocessing.active_children()
    assert "2 processes share the sequences of a step" in " ".join(two.plan.notes)
    assert two.verification is not None and two.verification.passed
    for a, b in zip(one.refit, two.refit, strict=True):
        assert {**a, "before": 0, "after": 0} == {**b, "before": 0, "after": 0}
        assert [b["before"], b["after"]] == pytest.approx([a["before"], a["after"]], rel=1e-5)
    first, second = (load_file(each.out / "model.safetensors") for each in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name].double(), tensor.double(), rtol=0.02, atol=0.02 * float(tensor.std())
        )
