"""The parts of a model that a conversion changes, and models whose parts convert exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from headwise import (
    bench_model,
    convert_model,
    evaluate_model,
    inspect_model,
    sample_text,
    uptrain_model,
    verify_model,
)
from headwise.convert.gqa.merge import replicate_heads
from headwise.convert.pipeline import ConvertResult
from headwise.errors import HeadwiseError, SettingError
from headwise.io.source import EMBEDDED_MODEL
from headwise.models import table
from headwise.models.architecture import find_architecture
from headwise.models.layout import LINEAR
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
        ({"groups": 2, "context": 4096}, "context", "acts on decoder-only models"),
        ({"groups": 2, "sliding_window": 4}, "sliding_window", "acts on decoder-only models"),
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


def test_an_encoder_has_no_cache_to_save(tmp_path: Path) -> None:
    folder = tiny_models.save("eurobert", tmp_path / "model", num_attention_heads=12, num_key_value_heads=6)
    inspection = inspect_model(folder)
    assert inspection.cache.bytes_per_token == 0 and {o.saved for o in inspection.options} == {0.0}
    result = convert_model(folder, tmp_path / "out", **TO_GQA, groups=3)
    assert "encoder: GQA, 6 KV heads -> GQA, 3 KV heads; no cache to save" in str(result.plan)
    assert result.plan.parameters_after < result.plan.parameters_before
    assert result.verification is not None and result.verification.passed
    assert verify_model(tmp_path / "out", folder).passed
    assert convert_model(tmp_path / "out", tmp_path / "back", to="mha").verification.passed  # type: ignore[union-attr]
    with pytest.raises(SettingError, match="trains decoder-only models"):
        convert_model(folder, tmp_path / "no", to="mqa", refit="joint")
    with pytest.raises(HeadwiseError, match="cannot be evaluated"):
        evaluate_model(tmp_path / "out", folder)


def test_cross_attention_to_an_image_is_merged_without_moments(tmp_path: Path) -> None:
    folder = tiny_models.save("mllama", tmp_path / "model", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    result = convert_model(folder, tmp_path / "out", to="mqa", calibration_tokens=512, refit=2)
    assert isinstance(result, ConvertResult)
    lines = str(result.plan).splitlines()
    assert any(line.startswith("text: ") and "cache per token" in line for line in lines)
    assert any(line.startswith("cross: ") and "cache per encoder token" in line for line in lines)
    assert any("No images are read" in line for line in lines)
    assert "refit" in result.layers[0] and "refit" not in result.layers[1]
    assert verify_model(tmp_path / "out", folder).passed


def test_moments_of_an_encoder_decoder_are_saved_and_used_again(tmp_path: Path) -> None:
    folder = tiny_models.save("t5gemma", tmp_path / "model", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"source": f"def f{n}(x): return x * {n}", "target": f"multiplies by {n}"} for n in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"to": "mqa", "refit": "off", "method": "aligned"}
    first = convert_model(
        folder,
        tmp_path / "a",
        **given,
        calibrate=str(pairs),
        calibration_tokens=4096,
        save_moments=tmp_path / "moments",
    )
    second = convert_model(folder, tmp_path / "b", **given, moments=tmp_path / "moments")
    assert isinstance(first, ConvertResult) and isinstance(second, ConvertResult)
    for layer in (2, 3):
        assert first.layers[layer]["value_error"] == pytest.approx(second.layers[layer]["value_error"], rel=1e-4)
        assert first.layers[layer]["value_error"] > 0


def double_heads(folder: Path) -> dict[str, Any]:
    """Give every part twice the KV heads, each second one the first in other coordinates, and return the config."""
    config = tiny_models.read_config(folder)
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    arch = find_architecture(config, tensors)
    layouts = arch.layouts(config)
    twice = arch.with_groups(config, {layout.part: 2 * layout.num_key_value_heads for layout in layouts})
    for layer in (place for place, layout in enumerate(layouts) if layout.part != LINEAR):
        gauged = random_gauge(replicate_heads(arch.read_layer(config, layer, tensors), 2), seed=layer)
        tensors |= arch.write_layer(twice, layer, gauged, torch.float64)
    rounded = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(twice))
    return config


@pytest.mark.parametrize("model_type", [*sorted(table.load_table().wrappers), "mllama"])
def test_an_image_in_the_prompt_gives_the_same_logits(tmp_path: Path, model_type: str) -> None:
    """Half the heads are copies in other coordinates: a conversion to half changes nothing, with an image too."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 3}
    if model_type.startswith("qwen"):
        heads |= (
            {"head_dim": 8} if model_type == "qwen3_vl" else {"num_attention_heads": 14, "num_key_value_heads": 7}
        )
    folder = tiny_models.save(model_type, tmp_path / "model", **heads)
    double_heads(folder)

    def run(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        loaded = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        given = tiny_models.image_inputs(loaded)
        given["pixel_values"] = given["pixel_values"].double()
        other = given | {"pixel_values": given["pixel_values"].flip(-1)}
        with torch.no_grad(), tiny_models.float64_throughout():
            return loaded(**given).logits, loaded(**other).logits

    before, moved = run(folder)
    assert float((moved - before).abs().max()) > 1e-3, "the image has no effect"
    result = convert_model(folder, tmp_path / "out", **TO_GQA, groups=heads["num_key_value_heads"])
    after = run(tmp_path / "out")[0]
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    assert result.verification is not None and result.verification.passed


@pytest.mark.parametrize("grouping", ["optimal", "contiguous"])
def test_heads_that_compute_the_same_merge_without_loss(tmp_path: Path, grouping: str) -> None:
    """Every second KV head is the first one in other coordinates, in all parts: half the heads are enough."""
    folder = tiny_models.save("t5gemma", tmp_path / "model")
    double_heads(folder)
    before = logits(folder)
    convert_model(
        folder, tmp_path / "out", **TO_GQA, part=["encoder=3", "decoder=3"], method="optimal", grouping=grouping
    )
    assert counts_of(tmp_path / "out") == (3, 3)
    assert float((logits(tmp_path / "out") - before).abs().max() / before.abs().max()) < 1e-4
