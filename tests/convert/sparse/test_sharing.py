"""Layers that share an indexer: the greedy choice, and the folder in the stock class that holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from headwise import convert_model, inspect_model, verify_model
from headwise.convert.calibration import loss_text
from headwise.convert.pipeline import ConvertResult
from headwise.convert.settings import ConvertSettings
from headwise.convert.sparse import sharing
from headwise.convert.sparse.sharing import SharingChoice, choose_sharing
from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.measure.shared_indexers import shared_indexers
from headwise.models.protocol import find_attention_model
from headwise.progress import SILENT
from tests.convert.sparse.test_budget import SPARSE, logits
from tests.convert.speaking import TEXT, save_speaking
from tests.test_bad_input import refused

CALIBRATE = {"calibrate": TEXT["calibrate"]}
TOKENS = torch.arange(2 * 25).view(2, 25) * 5 % 256 + 1


def save_sparse(folder: Path, **overrides: Any) -> Path:
    """A sparse model of four layers with a budget of nine keys."""
    source = save_speaking(folder.with_name("dense"), num_hidden_layers=4, **overrides)
    convert_model(source, folder, **SPARSE)
    return folder


def shared_logits(folder: Path, own: set[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    paths = [f"model.layers.{layer}.self_attn" for layer in range(4)]
    with torch.no_grad(), shared_indexers(model, paths, own):
        return model(TOKENS).logits


# Keys without and with a bias, which has an element of its own in the query factors.
@pytest.mark.parametrize(("model_type", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16)])
def test_the_stock_class_shares_what_was_measured(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_sparse(tmp_path / "sparse", model_type=model_type, dtype=dtype)
    result = convert_model(source, tmp_path / "out", index_layers=2, **CALIBRATE)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    own = {i for i, kind in enumerate(result.plan.config["indexer_types"]) if kind == "full"}
    assert 0 in own and len(own) == 2 and result.plan.config["architectures"] == ["GlmMoeDsaForCausalLM"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {int(name.split(".")[2]) for name in tensors if ".indexer." in name} == own

    before, after = logits(source, TOKENS), logits(tmp_path / "out", TOKENS)
    assert torch.allclose(after[:, :9], before[:, :9], atol=1e-5)  # up to the budget nothing changes
    assert float((after - before)[:, 12:].abs().max()) > 1e-2
    # Other keys of equal scores may be selected: scores are sums in another order.
    close = ((after - shared_logits(source, own)).abs().amax(-1) < 1e-3).float().mean()
    assert float(close) > 0.95

    record = json.loads((tmp_path / "out" / "headwise.json").read_text())
    assert record["arguments"]["index_layers"] == 2 and set(record["arguments"]["indexers"]["layers"]) == own
    inspection = inspect_model(tmp_path / "out")
    row, width = inspection.layouts[0], inspection.layouts[0].indexer
    assert width is not None
    shared = [layout.cache_elements_per_token for layout in inspection.layouts if layout.shares_indexer]
    assert shared == [row.cache_elements_per_token - width.index_head_dim] * 2
    assert "of 2 indexers" in str(result.plan) and verify_model(tmp_path / "out", source).passed


def test_all_layers_keep_their_indexers(tmp_path: Path) -> None:
    source = save_sparse(tmp_path / "sparse")
    convert_model(source, tmp_path / "out", index_layers=4, **CALIBRATE)
    assert torch.allclose(logits(tmp_path / "out", TOKENS), logits(source, TOKENS), atol=1e-5)


def choice(folder: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[int, float], **given: Any) -> SharingChoice:
    """The choice for losses of each layer that add up."""

    def measured(_: Any, __: Any, ___: Any, paths: list[str], own: list[int], **____: Any) -> Any:
        missing = set(range(len(paths))) - set(own)
        return type("Loss", (), {"nats": 3.0 + sum(losses[layer] for layer in missing)})

    monkeypatch.setattr(sharing, "loss_with_shared", measured)
    checkpoint = open_checkpoint(folder)
    model = find_attention_model(checkpoint.config, checkpoint.tensors)
    settings = ConvertSettings(**given, **CALIBRATE)
    found = choose_sharing(checkpoint, model, settings, torch.device("cpu"), SILENT)
    assert found is not None
    again = choose_sharing(checkpoint, model, settings, torch.device("cpu"), SILENT, found.recorded()["indexers"])
    assert again == found
    return found


def test_the_choice_is_greedy_and_keeps_the_first_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, losses = save_sparse(tmp_path / "sparse"), {1: 0.03, 2: 0.001, 3: 0.004}
    two = choice(source, monkeypatch, losses, index_layers=2)
    assert two.layers == (0, 1) and two.given_up == (2, 3) and two.losses == pytest.approx((0.001, 0.005))
    one = choice(source, monkeypatch, losses, index_layers=1)
    assert one.layers == (0,) and one.loss == pytest.approx(0.035)
    within = choice(source, monkeypatch, losses, index_layers="auto")
    assert within.layers == (0, 1) and within.limit == 0.01
    none = choice(source, monkeypatch, losses, index_layers="auto", index_loss=1e-4)
    assert none.layers == (0, 1, 2, 3) and none.loss == 0
    with pytest.raises(HeadwiseError, match="is not finite"):
        choice(source, monkeypatch, dict.fromkeys(range(4), float("nan")), index_layers=2)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_forecast_counts_every_indexer_that_runs(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ran, counted = save_sparse(tmp_path / "sparse"), list[int](), list[tuple[int, int]]()

    def plan(*arguments: Any, index_passes: int, **named: Any) -> Any:
        counted.append((arguments[5], index_passes))
        return loss_text.plan_loss_text(*arguments, index_passes=index_passes, **named)

    def measured(_: Any, __: Any, ___: Any, ____: Any, own: list[int], **_____: Any) -> Any:
        ran.append(len(own))
        return type("Loss", (), {"nats": 3.0})

    monkeypatch.setattr(sharing, "plan_loss_text", plan)
    monkeypatch.setattr(sharing, "loss_with_shared", measured)
    checkpoint = open_checkpoint(source)
    model = find_attention_model(checkpoint.config, checkpoint.tensors)
    settings = ConvertSettings(index_layers=layers, **CALIBRATE)
    found = choose_sharing(checkpoint, model, settings, torch.device("cpu"), SILENT)
    assert found is not None and found.sequences > loss_text.SEQUENCES
    assert counted == [(len(ran), sum(ran))]
    # Long scores leave time for less text.
    monkeypatch.setattr(loss_text, "index_score_seconds", lambda *_: 1e4)
    again = choose_sharing(checkpoint, model, settings, torch.device("cpu"), SILENT)
    assert again is not None and again.sequences == loss_text.SEQUENCES


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--index-layers", "5"), "--index-layers is 5, and the model has 4 layers"),
        (("--index-layers", "most"), "which is not auto or a number of layers"),
        (("--index-layers", "2", "--sparse", "dsa"), "--index-layers and --sparse contradict each other"),
        (("--sparse", "dsa"), "is a deepseek_v32 model, which has indexers already"),
    ],
)
def test_what_a_sparse_source_cannot_become(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    source = save_sparse(tmp_path / "home" / "sparse")
    assert words in " ".join(refused(source, "", *options, out=tmp_path / "out").split())


def test_sources_without_indexers_of_their_own(tmp_path: Path) -> None:
    source = save_sparse(tmp_path / "sparse")
    dense = refused(tmp_path / "dense", "", "--index-layers", "2")
    assert "has none. Convert it with --sparse first" in " ".join(dense.split())
    convert_model(source, tmp_path / "home" / "shared", index_layers=2, **CALIBRATE)
    again = refused(tmp_path / "home" / "shared", "", "--index-layers", "1", out=tmp_path / "again")
    assert "is a glm_moe_dsa model, which has indexers already" in " ".join(again.split())
