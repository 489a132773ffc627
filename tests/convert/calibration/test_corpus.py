"""The calibration text: which one is read and why, what is kept and held back, and how its losses are reported."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headwise.convert.calibration import corpus
from headwise.convert.calibration.corpus import MIXTURE, NUM_HELDBACK, SAMPLED, choose_text, read_corpus
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.plan import Plan
from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from headwise.progress import Progress
from tests import small_parents
from tests.convert.speaking import save_speaking

CPU = torch.device("cpu")
TARGET: dict[str, Any] = {"to": "mqa", "refit": "off", "calibration_tokens": 100}


class Heard(Progress):
    """Keeps warnings and the names of stages."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.stages: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.stages.append(name)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_parents.parent(tmp_path_factory.mktemp("corpus") / "parent", max_position_embeddings=32)


def plan_of(text: str, **changes: Any) -> Any:
    return SimpleNamespace(**{"text": text, "sequences": 3, "length": 17, "seed": 0} | changes)


def test_auto_samples_where_the_forecast_allows_it(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(parent)
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    assert choose_text(checkpoint, arch, "auto", 32_768, CPU).text == MIXTURE
    chosen = choose_text(checkpoint, arch, "auto", 98_304, CPU)
    assert chosen.text == SAMPLED and "within the limit of" in str(chosen.reason)
    assert choose_text(checkpoint, arch, "auto", 10**12, CPU).text == MIXTURE
    assert choose_text(checkpoint, arch, "builtin", 10**12, CPU) == corpus.TextChoice("builtin")
    monkeypatch.setattr(corpus, "available_memory", lambda device: 1000)
    refused = choose_text(checkpoint, arch, "auto", 98_304, CPU)
    assert refused.text == MIXTURE and "memory" in str(refused.reason)


@pytest.mark.parametrize("text", [SAMPLED, MIXTURE])
def test_text_is_kept_and_its_heldback_part_is_disjoint(parent: Path, tmp_path: Path, text: str) -> None:
    checkpoint = open_checkpoint(parent)
    blocks, heldback = read_corpus(checkpoint, plan_of(text), CPU, cache=tmp_path)
    assert blocks.shape == (3, 17) and heldback.shape == (NUM_HELDBACK, 17)
    rows = {tuple(row) for row in blocks.tolist()}
    assert not rows & {tuple(row) for row in heldback.tolist()}
    kept = (tmp_path / corpus.FILE).read_bytes()
    again, _ = read_corpus(checkpoint, plan_of(text), CPU, cache=tmp_path)
    assert torch.equal(again, blocks) and (tmp_path / corpus.FILE).read_bytes() == kept
    other, _ = read_corpus(checkpoint, plan_of(text, seed=1), CPU, cache=tmp_path)
    assert not torch.equal(other, blocks)
    (tmp_path / corpus.FILE).write_bytes(b"damaged")
    assert torch.equal(read_corpus(checkpoint, plan_of(text), CPU, cache=tmp_path)[0], blocks)


def test_a_short_file_is_read_without_a_heldback_part(parent: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x = 1\n" * 10)
    blocks, heldback = read_corpus(open_checkpoint(parent), plan_of(str(path), sequences=2), CPU)
    assert len(blocks) == 2 and len(heldback) < NUM_HELDBACK
    with pytest.raises(HeadwiseError, match="blocks of 17 tokens, and 900 are needed"):
        read_corpus(open_checkpoint(parent), plan_of(str(path), sequences=900), CPU)


def test_plan_and_record_name_the_text_and_the_reason(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LOSS_SECONDS", 100.0)
    monkeypatch.setattr(corpus, "FEWEST_SAMPLED", 0)
    dry = convert_model(parent, tmp_path / "out", **TARGET, calibrate="auto", dry_run=True)
    assert isinstance(dry, Plan)
    assert any(note.startswith("Calibration text: sampled, because sampling is forecast") for note in dry.notes)
    assert {"sampling", "calibration", "layers", "files", "losses"} == {*dry.seconds}
    done = convert_model(parent, tmp_path / "out", **TARGET, calibrate="auto", verify=False)
    assert isinstance(done, ConvertResult)
    record = json.loads((tmp_path / "out" / "headwise.json").read_text())
    assert record["arguments"]["calibration"]["text"] == SAMPLED
    assert "within the limit" in record["arguments"]["calibration"]["reason"]
    assert "--calibrate sampled" in record["command"]
    loss = record["text_loss"]
    assert loss == done.to_dict()["text_loss"] and loss["tokens"] == NUM_HELDBACK * 31
    assert loss["samples"] is None and 0 < loss["before"] != loss["after"] > 0


def test_text_that_does_not_fit_is_named_once(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LOSS_SECONDS", 100.0)
    fitting, foreign = Heard(), Heard()
    asked = {**TARGET, "calibrate": "builtin", "verify": False}
    convert_model(parent, tmp_path / "a", **asked, progress=fitting)
    monkeypatch.setattr(corpus, "FAR_ABOVE", -100.0)
    done = convert_model(parent, tmp_path / "b", **asked, progress=foreign)
    (warning,) = [text for text in foreign.warnings if "does not fit" in text]
    assert isinstance(done, ConvertResult) and done.text_loss is not None
    assert done.text_loss.text is not None and done.text_loss.samples is not None
    assert f"{done.text_loss.samples:.2f} on its own samples" in warning
    assert not any("does not fit" in text for text in fitting.warnings)


def test_foreign_text_is_warned_of_once(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LOSS_SECONDS", 100.0)
    monkeypatch.setattr(corpus, "FAR_ABOVE", -100.0)
    for number, options in enumerate(({}, {"allow_nan": True})):
        heard = Heard()
        asked = {**TARGET, "calibrate": "auto", "verify": False, **options}
        done = convert_model(parent, tmp_path / str(number), **asked, progress=heard)
        assert isinstance(done, ConvertResult) and done.plan.arguments["calibration"]["text"] == MIXTURE
        warned = [
            text for text in (*done.plan.warnings, *heard.warnings) if "foreign" in text or "fit the model" in text
        ]
        assert len(warned) == 1 and "foreign" in warned[0]


def test_losses_are_left_out_where_they_take_too_long(parent: Path, tmp_path: Path) -> None:
    heard = Heard()
    done = convert_model(parent, tmp_path / "out", **TARGET, calibrate="builtin", verify=False, progress=heard)
    assert isinstance(done, ConvertResult) and done.text_loss is None
    assert not any("Measuring" in stage for stage in heard.stages)


def test_a_broken_tensor_is_named_where_text_is_sampled(parent: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = small_parents.parent(tmp_path / "broken", max_position_embeddings=32)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("q_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(HeadwiseError, match=f"Tensor {name} holds NaN"):
        convert_model(model, tmp_path / "out", **TARGET, calibrate="sampled")
    planned = convert_model(model, tmp_path / "out", **TARGET, calibrate="auto", allow_nan=True, dry_run=True)
    assert isinstance(planned, Plan) and planned.arguments["calibration"]["text"] == MIXTURE


@pytest.mark.parametrize("loss", [[], {}, {"tokens": "x", "before": 1.0}, {"tokens": 1, "before": "yarn"}])
def test_a_journal_with_another_loss_is_refused(tmp_path: Path, loss: Any) -> None:
    nothing: list[Any] = [None] * 5
    writer: Any = SimpleNamespace(notes={corpus.NOTE: loss}, work=SimpleNamespace(folder=tmp_path))
    with pytest.raises(HeadwiseError, match="holds another loss"):
        corpus.measure_converted(tmp_path, *nothing[:2], writer, *nothing[2:])


def test_the_plan_says_beyond_which_length_nothing_was_calibrated(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"to": "mqa", "calibrate": argparse.__file__, "calibration_tokens": 4096}
    for context, told in ((1024, False), (2048, True)):
        parent = save_speaking(tmp_path / str(context), max_position_embeddings=context)
        plan: Any = convert_model(parent, tmp_path / "out", **settings, refit="off", dry_run=True)
        assert any("Retrieval: in prompts beyond 1,024 tokens" in note for note in plan.notes) is told
    joint: Any = convert_model(parent, tmp_path / "out", **settings, refit="joint", dry_run=True)
    assert not any("Retrieval" in note for note in joint.notes)
