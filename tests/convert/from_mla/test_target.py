"""Models with MLA as sources: every stock class loads its reduced folder, and computes what the reduction left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headwise import convert_model, inspect_model, verify_model
from headwise.errors import HeadwiseError, SettingError
from headwise.models.deepseek import half_split, interleave
from headwise.models.protocol import find_attention_model
from headwise.models.table import load_table
from tests import small_parents, tiny_models

TYPES = sorted(tiny_models.LATENTS)
SMALL: dict[str, Any] = {"to": "mla", "rank": 12, "rope_dim": 8, "calibrate": "none"}


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=tiny_models.tokens()).logits
    return result


def test_every_stock_class_has_a_tiny_model() -> None:
    assert set(load_table().latents) == set(TYPES)


@pytest.mark.parametrize("model_type", TYPES)
def test_what_the_latent_does_not_use_is_left_out_exactly(model_type: str, tmp_path: Path) -> None:
    source = tiny_models.save(model_type, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    half = model_type == "minicpm3"
    for name in [n for n in tensors if "kv_a_proj_with_mqa" in n]:
        latent, key = tensors[name][:20].clone(), tensors[name][20:]
        latent[12:] = latent[:8] - latent[4:12]  # 12 dimensions of 20
        matrix = key if key.dim() == 2 else key[:, None]
        planes = matrix if half else half_split(matrix)
        planes[[1, 3, 5, 7]] = 0  # of the planes 0 to 3, those that a key of half the width has not
        tensors[name] = torch.cat([latent, (planes if half else interleave(planes)).view_as(key)]).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    expected = logits(source)
    out = tmp_path / "out"
    for rope_dim in (8, 4):
        convert_model(source, out, **SMALL | {"rope_dim": rope_dim}, force=True)
        assert (logits(out) - expected).abs().max() < 2e-4 * expected.abs().max()
        config = tiny_models.read_config(out)
        layout = find_attention_model(config).layouts(config)[0]
        assert (layout.kv_lora_rank, layout.rotary_dim) == (12, rope_dim)
        before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
        for name, tensor in before.items():
            if "kv_a" not in name and "kv_b" not in name and not (rope_dim == 4 and ".q_" in name):
                assert torch.equal(after[name], tensor), name
        assert verify_model(out, source).passed


def test_calibration_and_refit_run_on_the_norm_of_the_latent(tmp_path: Path) -> None:
    source = small_parents.tiny_parent(tmp_path / "model", "youtu")
    text = small_parents.text(tmp_path / "text.txt")
    more: dict[str, Any] = {"calibrate": str(text), "calibration_tokens": 2048}
    result = convert_model(source, tmp_path / "out", to="mla", rank=8, rope_dim=8, refit=20, **more)
    for report in result.layers.values():  # type: ignore[union-attr]
        assert 0 < report["key_error"] + report["value_error"] < 1
        assert report["refit"]["before"] < 1
    assert verify_model(tmp_path / "out", source).passed
    inspection = inspect_model(tmp_path / "out")
    assert inspection.layouts[0].kv_lora_rank == 8 and inspection.model_type == "youtu"


def test_a_folder_of_headwise_is_reduced_again(tmp_path: Path) -> None:
    parent = small_parents.parent(tmp_path / "parent")
    small_parents.converted(parent, tmp_path / "mla", to="mla", rank=16, rope_dim=8)
    text = small_parents.text(tmp_path / "text.txt")
    convert_model(
        tmp_path / "mla",
        tmp_path / "out",
        to="mla",
        rank=14,
        rope_dim=4,
        calibrate=str(text),
        calibration_tokens=2048,
    )
    assert verify_model(tmp_path / "out", tmp_path / "mla").passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 20, "rope_dim": 8}, r"makes no smaller cache: the model caches 20 \+ 8"),
        ({"rank": 12, "rope_dim": 6}, r"divided by a whole number \(2, 4\)"),
        ({"cache": 0.2}, r"leaves 6 elements"),
        ({"exact": True}, "`exact` does not act on"),
        ({"cache": 0.5, "method": "transmla"}, "`method` transmla makes MLA from heads"),
        ({"cache": 0.5, "context": 256}, "`context` does not act on"),
        ({"cache": 0.5, "sliding_window": 0}, "`sliding_window` does not act on"),
        ({"cache": 0.5, "refit": "joint"}, "keeps those of"),
    ],
)
def test_what_a_model_with_mla_cannot_become(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = tiny_models.save("youtu", tmp_path / "model")
    with pytest.raises(SettingError, match=message):
        convert_model(source, tmp_path / "out", to="mla", **settings)


@pytest.mark.parametrize(
    "settings", [{"to": "gqa", "groups": 1}, {"to": "mha"}, {"dtype": "bfloat16"}, {"requantize": "fp8"}]
)
def test_a_model_with_mla_gets_no_kv_heads(settings: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_models.save("youtu", tmp_path / "model")
    with pytest.raises(HeadwiseError, match="is a youtu model, which has MLA already") as refusal:
        convert_model(source, tmp_path / "out", **settings)
    assert "Give `to` mla with `cache`" in (refusal.value.hint or "")


def test_other_frequencies_have_no_narrower_key(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    source = tiny_models.save("youtu", tmp_path / "model", rope_parameters=yarn | {"mscale_all_dim": 1.0})
    with pytest.raises(SettingError, match="yarn frequencies of another width"):
        convert_model(source, tmp_path / "out", **SMALL | {"rope_dim": 4})
    convert_model(source, tmp_path / "out", **SMALL)
    assert verify_model(tmp_path / "out", source).passed


def test_rotary_rows_in_another_order_are_refused(tmp_path: Path) -> None:
    source = tiny_models.save("youtu", tmp_path / "model")
    config = tiny_models.read_config(source) | {"rope_interleave": False}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadwiseError, match="rope_interleave: false"):
        convert_model(source, tmp_path / "out", **SMALL)
