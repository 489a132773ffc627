"""Layers that get a window by the measured loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.convert.calibration import loss_text
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.plan import Plan
from headwise.convert.positions import window_choice
from headwise.convert.positions.window_choice import WindowChoice, choose_windows, recorded_choice
from headwise.convert.settings import ConvertSettings
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import open_checkpoint
from headwise.io.source import EMBEDDED_MODEL
from headwise.io.tokenizer import load_tokenizer
from headwise.measure.window_loss import loss_beyond
from headwise.models.architecture import find_architecture
from headwise.models.stock import load_model
from headwise.progress import SILENT
from headwise.text.blocks import blocks_from
from tests import tiny_models

WINDOW = 16
CPU = torch.device("cpu")


@pytest.mark.parametrize("limit", [0.0, 0.4, 1.0, 2.5, 9.0])
@pytest.mark.parametrize("losses", [[1.0], [0.5, 1.0, 1.5], [0.1, 0.2, 0.3, 0.5, 1.1, 2.0, 3.0]])
def test_the_most_windows_within_the_limit(losses: list[float], limit: float) -> None:
    measured: list[int] = []

    def loss(count: int) -> float:
        measured.append(count)
        return losses[count - 1]

    found = window_choice._largest_within(loss, len(losses), limit)
    assert found == sum(nats <= limit for nats in losses)
    assert len(measured) <= 1 + len(losses).bit_length()


def test_the_layers_and_their_losses_are_recorded_and_true(tmp_path: Path) -> None:
    result = convert_model(
        EMBEDDED_MODEL, tmp_path / "out", sliding_window=WINDOW, window_layers="auto", window_loss=0.1
    )
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    record = json.loads((tmp_path / "out/headwise.json").read_text("utf-8"))
    windows = record["arguments"]["windows"]
    child = open_checkpoint(tmp_path / "out")
    layouts = find_architecture(child.config).layouts(child.config)
    chosen = [i for i, layout in enumerate(layouts) if layout.sliding_window]
    assert chosen == windows["layers"] and 0 < len(chosen) < len(layouts)
    assert windows["loss"] <= windows["limit"] == 0.1
    # The layers without a window are those where it costs most.
    losses = windows["layer_loss"]
    assert max(losses[i] for i in chosen) <= min(losses[i] for i in range(len(layouts)) if i not in chosen)
    # The written folder has the loss that the plan states.
    tokenizer = load_tokenizer(EMBEDDED_MODEL, "the embedded model")
    shape = {"length": windows["length"], "count": windows["sequences"] + 2}
    blocks = blocks_from("builtin", tokenizer, split="calibration", seed=0, **shape)[: windows["sequences"]]
    after = loss_beyond(load_model(child, "AutoModelForCausalLM", torch.float32), blocks, WINDOW)
    assert after.tokens == windows["tokens"]
    assert after.nats == pytest.approx(windows["parent"] + windows["loss"], abs=1e-4)
    assert f"--window-layers {record['arguments']['window_layers']}" in record["command"]
    assert "--window-loss" not in record["command"]


def test_the_plan_measures_named_layers_and_the_missing_sinks(tmp_path: Path) -> None:
    plan = convert_model(EMBEDDED_MODEL, tmp_path / "out", sliding_window=WINDOW, dry_run=True)
    assert isinstance(plan, Plan)
    windows = plan.arguments["windows"]
    assert plan.arguments["window_layers"] == "all" and windows["limit"] is None
    assert windows["layer_loss"] == [None] * 5 and windows["loss"] > windows["first_loss"]
    assert any("the missing sinks cost +" in note for note in plan.notes)
    assert any("The windows cost" in line for line in plan.warnings) == (windows["loss"] >= 0.1)


def chosen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    loss: Callable[..., float],
    earlier: dict[str, Any] | None = None,
    **given: Any,
) -> Any:
    """The choice for a tiny model whose losses are given by the paths of the layers with windows."""
    checkpoint = open_checkpoint(tiny_models.save(model_type, tmp_path / "model"))
    monkeypatch.setattr(loss_text, "tokenizer_kind", lambda _: "bpe")
    monkeypatch.setattr(window_choice, "read_corpus", lambda *_: (tiny_models.tokens(12), None))

    def measured(_: Any, blocks: torch.Tensor, __: int, paths: list[str], *, first: int) -> Any:
        return type("Loss", (), {"nats": 3.0 + loss(sorted(paths), first)})

    monkeypatch.setattr(window_choice, "loss_beyond", measured)
    settings = ConvertSettings(sliding_window=WINDOW, window_layers="auto", **given)
    return choose_windows(checkpoint, find_architecture(checkpoint.config), settings, CPU, SILENT, earlier)


def test_learned_sinks_and_windows_of_the_source_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    firsts: list[int] = []

    def loss(paths: list[str], first: int) -> float:
        firsts.append(first)
        return 0.002 * len(paths)

    choice = chosen(tmp_path, monkeypatch, "gpt_oss", loss)
    assert isinstance(choice, WindowChoice)
    assert set(firsts) == {0} and choice.first_loss is None and choice.layer_loss[0] is None
    assert 0 in choice.layers and choice.loss == pytest.approx(0.002 * len(choice.layers))
    assert "learned ones" in " ".join(choice.notes())


def test_a_resumed_run_keeps_its_choice_and_measures_a_damaged_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(paths: list[str], _: int) -> float:
        return 0.004 * len(paths)

    choice = chosen(tmp_path / "first", monkeypatch, "qwen3", loss)
    noted = json.loads(json.dumps(recorded_choice(choice)["windows"]))
    kept = chosen(tmp_path / "second", monkeypatch, "qwen3", lambda *_: math.nan, noted)
    again = chosen(tmp_path / "third", monkeypatch, "qwen3", loss, noted | {"layers": "all"})
    assert kept == again == choice


def test_no_window_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(paths: list[str], _: int) -> float:
        return sum(0.3 if ".1." in path else 0.5 for path in paths)

    with pytest.raises(HeadwiseError, match=r"costs 0\.3000 nats per token in layer 1.*`window_loss` is 0\.2"):
        chosen(tmp_path, monkeypatch, "qwen3", loss, window_loss=0.2)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("starcoder2", "the stock starcoder2 class has no window per layer"),
        ("gemma3_text", "decides how its positions rotate"),
        ("llama", "attention_bias: true"),
        ("qwen3", "no tokenizer"),
    ],
)
def test_refusals_of_a_choice_by_loss(tmp_path: Path, model_type: str, message: str) -> None:
    model = tiny_models.save(model_type, tmp_path / "model")
    with pytest.raises(HeadwiseError, match=message):
        convert_model(model, tmp_path / "out", sliding_window=WINDOW, window_layers="auto", dry_run=True)


def test_an_engine_refuses_a_window_before_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_choice, "plan_loss_text", lambda *_, **__: pytest.fail("measured"))
    for layers in ("all", "auto"):
        with pytest.raises(SettingError, match=r"llama\.cpp, which"):
            convert_model(
                EMBEDDED_MODEL, tmp_path / "out", sliding_window=WINDOW, window_layers=layers, engines="llama.cpp"
            )


def test_windows_without_a_tokenizer_are_set_and_not_measured(tmp_path: Path) -> None:
    model = tiny_models.save("qwen3", tmp_path / "model")
    plan = convert_model(model, tmp_path / "out", sliding_window=WINDOW, dry_run=True)
    assert isinstance(plan, Plan) and "windows" not in plan.arguments
    assert any("the windows is not measured: the model has no tokenizer" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sliding_window": 0, "window_layers": "auto"}, "0 removes every window"),
        ({"sliding_window": 8, "window_layers": "auto", "calibrate": "none"}, "measures losses on text"),
        ({"sliding_window": 8, "window_layers": "alternate", "window_loss": 0.1}, "acts only with"),
        ({"sliding_window": 8, "window_loss": 0.1}, "`window_loss` needs `window_layers`"),
        ({"sliding_window": 8, "to": "mla", "exact": True}, "no stock MLA class has a sliding window"),
    ],
)
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        ConvertSettings(**given)
