"""The parts of a model that a conversion changes, and models whose parts convert exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from headwise import (
    bench_model,
    convert_model,
    evaluate_model,
    sample_text,
    uptrain_model,
    verify_model,
)
from headwise.convert.gqa.merge import replicate_heads
from headwise.errors import HeadwiseError, SettingError
from headwise.models.architecture import find_architecture
from tests import tiny_models
from tests.models.test_architecture import random_gauge

TO_GQA = {"to": "gqa", "calibrate": "none", "refit": "off"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("t5gemma", tmp_path / "model", num_attention_heads=12, num_key_value_heads=6)


def counts_of(folder: Path) -> tuple[int, int]:
    config = json.loads((folder / "config.json").read_text())
    return config["encoder"]["num_key_value_heads"], config["decoder"]["num_key_value_heads"]


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"groups": 2}, (3, 2)),
        ({"groups": 3, "part": "cross"}, (3, 3)),
        ({"part": ["decoder=2", "encoder=1"]}, (1, 2)),
        ({"groups": 1, "part": ["encoder", "decoder=3"]}, (1, 3)),
    ],
)
def test_each_part_gets_its_number(model: Path, tmp_path: Path, settings: dict[str, Any], counts: Any) -> None:
    result = convert_model(model, tmp_path / "out", **TO_GQA, **settings)
    assert counts_of(tmp_path / "out") == counts
    assert result.verification is not None and result.verification.passed
    assert verify_model(tmp_path / "out", model).passed
    lines = str(result.plan).splitlines()
    assert any(line.startswith("encoder: ") and "no cache to save" in line for line in lines)
    assert any(line.startswith("decoder: ") and "cache per decoder token" in line for line in lines)
    assert any(line.startswith("cross: ") and "cache per encoder token" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"groups": 2, "part": "text"}, "part", "t5gemma has encoder, decoder, cross"),
        ({"part": ["decoder=2", "cross=3"]}, "part", "one number for both"),
        ({"groups": 2, "context": 4096}, "context", "models of one attention stack"),
        ({"groups": 2, "sliding_window": 4}, "sliding_window", "models of one attention stack"),
        ({"groups": 4}, "groups", "Layer 2 has 6 key-value heads, which cannot become 4"),
    ],
)
def test_what_the_parts_do_not_allow_is_refused(
    model: Path, tmp_path: Path, settings: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        convert_model(model, tmp_path / "out", **TO_GQA, **settings)
    assert caught.value.field == field and not (tmp_path / "out").exists()


def test_a_joint_refit_and_mla_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="trains decoder-only models"):
        convert_model(model, tmp_path / "out", to="mqa", refit="joint")
    with pytest.raises(HeadwiseError, match="cannot become MLA"):
        convert_model(model, tmp_path / "out", to="mla", cache=0.5)


def test_the_other_verbs_refuse_an_encoder_decoder_before_any_work(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 9000)
    calls = [
        lambda: evaluate_model(model, model, report=tmp_path / "report"),
        lambda: uptrain_model(model, tmp_path / "out", teacher=model, tokens=4096, text=str(text)),
        lambda: bench_model(model, model, context=8),
        lambda: sample_text(model, tmp_path / "out.jsonl", tokens=64),
    ]
    for call in calls:
        with pytest.raises(HeadwiseError, match="is an encoder-decoder model"):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}


def test_a_decoder_only_model_has_the_part_text(tmp_path: Path) -> None:
    llama = tiny_models.save("llama", tmp_path / "llama")
    convert_model(llama, tmp_path / "out", to="mqa", part="text", calibrate="none", refit="off")
    assert tiny_models.read_config(tmp_path / "out")["num_key_value_heads"] == 1
    with pytest.raises(SettingError, match="llama has text"):
        convert_model(llama, tmp_path / "out", to="mqa", part="cross", calibrate="none")


def logits(folder: Path) -> torch.Tensor:
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad(), tiny_models.float64_throughout():
        return loaded(**tiny_models.inputs_of(loaded)).logits


@pytest.mark.parametrize("grouping", ["optimal", "contiguous"])
def test_heads_that_compute_the_same_merge_without_loss(tmp_path: Path, grouping: str) -> None:
    """Every second KV head is the first one in other coordinates, in all parts: half the heads are enough."""
    folder = tiny_models.save("t5gemma", tmp_path / "model")
    config = tiny_models.read_config(folder)
    arch = find_architecture(config)
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    parts = {"encoder": 6, "decoder": 6}
    twice = arch.with_groups(config, parts)
    for layer in range(len(arch.order)):
        weights = arch.read_layer(config, layer, tensors)
        old = weights.layout
        gauged = random_gauge(replicate_heads(weights, 2), seed=layer)
        assert gauged.layout.num_key_value_heads == 2 * old.num_key_value_heads
        tensors |= arch.write_layer(twice, layer, gauged, torch.float64)
    rounded = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(twice))
    before = logits(folder)
    convert_model(
        folder, tmp_path / "out", **TO_GQA, part=["encoder=3", "decoder=3"], method="optimal", grouping=grouping
    )
    assert counts_of(tmp_path / "out") == (3, 3)
    assert float((logits(tmp_path / "out") - before).abs().max() / before.abs().max()) < 1e-4
