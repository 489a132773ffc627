"""MLA that headwise wrote becomes heads again, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headwise import convert_model, inspect_model, verify_model
from headwise.errors import HeadwiseError, SettingError
from tests import small_parents, tiny_models


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=tiny_models.tokens(24)).logits
    return result


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("llama", {"exact": True}),
        ("llama", {"rank": 12, "rope_dim": 4}),
        ("llama", {"rank": 12, "rope_dim": 4, "rope_frequencies": "free"}),
        ("qwen2", {"rank": 12, "rope_dim": 4}),
    ],
)
def test_heads_compute_what_the_latent_does(kind: str, shape: dict[str, Any], tmp_path: Path) -> None:
    parent = small_parents.parent(tmp_path / "parent", kind)
    mla = small_parents.converted(parent, tmp_path / "mla", to="mla", **shape)
    result = convert_model(mla, tmp_path / "out", to="mha")
    assert result.plan.exact  # type: ignore[union-attr]
    expected = logits(mla)
    assert (logits(tmp_path / "out") - expected).abs().max() < 1e-4 * expected.abs().max()
    config = tiny_models.read_config(tmp_path / "out")
    assert config["architectures"] == ["Glm4MoeForCausalLM"] and config["num_key_value_heads"] == 4
    assert verify_model(tmp_path / "out", mla).passed
    convert_model(tmp_path / "out", tmp_path / "gqa", to="gqa", groups=2, calibrate="none")
    assert verify_model(tmp_path / "gqa", tmp_path / "out").passed


def test_an_output_bias_has_no_place(tmp_path: Path) -> None:
    parent = small_parents.parent(tmp_path / "parent", "qwen2")
    mla = small_parents.converted(parent, tmp_path / "mla", to="mla", rank=12, rope_dim=4)
    tensors = load_file(mla / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"] += 1
    save_file(tensors, mla / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadwiseError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero"):
        convert_model(mla, tmp_path / "out", to="mha")


def test_heads_keep_the_positions_of_the_latent(tmp_path: Path) -> None:
    parent = small_parents.parent(tmp_path / "parent")
    mla = small_parents.converted(parent, tmp_path / "mla", to="mla", rank=12, rope_dim=4)
    for settings in ({"context": 256}, {"sliding_window": 8}, {"sliding_window": 0}):
        with pytest.raises(SettingError, match="which has MLA already"):
            convert_model(mla, tmp_path / "out", to="mha", **settings)


def test_heads_are_not_merged_from_a_latent(tmp_path: Path) -> None:
    parent = small_parents.parent(tmp_path / "parent")
    mla = small_parents.converted(parent, tmp_path / "mla", to="mla", rank=12, rope_dim=4)
    with pytest.raises(HeadwiseError, match="no key-value heads to merge"):
        convert_model(mla, tmp_path / "out", to="mqa")


def test_mixtures_have_no_way_back_to_heads_yet(tmp_path: Path) -> None:
    source = tiny_models.save("mixtral", tmp_path / "model", sliding_window=None)
    mla = tmp_path / "mla"
    convert_model(source, mla, to="mla", exact=True)
    with pytest.raises(HeadwiseError, match="for dense models only, and this is a mixture of experts"):
        convert_model(mla, tmp_path / "out", to="mha")
    assert "mha" not in {option.to for option in inspect_model(mla).options}
