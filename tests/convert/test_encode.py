"""How an output is stored: block FP8 in the stock format, experts of gpt-oss as their source has them, or plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headwise import convert_model, verify_model
from headwise.convert.plan import Plan
from headwise.errors import HeadwiseError, SettingError
from headwise.io.quantized.dequantize import blocks_to_plain
from headwise.io.quantized.fp8 import BLOCK, round_to_blocks
from headwise.io.reader import open_checkpoint
from tests import tiny_models

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": False,
}
SMALL: dict[str, Any] = {"rank": 128, "rope_dim": 32, "calibrate": "none", "engines": "llama.cpp"}
UNCALIBRATED: dict[str, Any] = {"to": "mqa", "calibrate": "none"}


def entry_of(folder: Path) -> dict[str, Any] | None:
    entry: dict[str, Any] | None = tiny_models.read_config(folder).get("quantization_config")
    return entry


def save_gpt_oss(folder: Path) -> Path:
    """A tiny gpt-oss with its experts in MXFP4, as published."""
    tiny_models.save("gpt_oss", folder, torch.bfloat16, hidden_size=64, intermediate_size=32)
    generator = torch.Generator().manual_seed(9)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = tiny_models.read_config(folder) | {"quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_block_fp8_is_loaded_by_the_stock_class(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    out = tmp_path / "out"
    convert_model(source, out, **UNCALIBRATED, requantize="fp8")
    plain = tmp_path / "plain"
    convert_model(source, plain, **UNCALIBRATED)
    kept = entry_of(out)["modules_to_not_convert"]  # type: ignore[index]
    assert "lm_head" in kept and "model.layers.1.self_attn.k_proj" in kept  # 64 rows are no whole block
    stored, expected = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        values = expected[name]
        if f"{name}_scale_inv" in stored:
            assert stored[name].dtype == torch.float8_e4m3fn
            values = round_to_blocks(values)
        assert torch.equal(tensor, values), name
    assert sum(name.endswith("_scale_inv") for name in stored) == 10
    assert verify_model(out, source).passed and verify_model(out, hashes=True).passed


def test_projections_of_the_latent_stay_in_full(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    convert_model(source, tmp_path / "out", to="mla", requantize="fp8", **SMALL)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"):
        assert stored[f"model.layers.0.self_attn.{name}.weight"].dtype == torch.bfloat16
        assert f"model.layers.0.self_attn.{name}" in entry_of(tmp_path / "out")["modules_to_not_convert"]  # type: ignore[index]
    assert stored["model.layers.0.self_attn.kv_b_proj.weight"].dtype == torch.float8_e4m3fn
    assert verify_model(tmp_path / "out", source).passed


def test_an_fp8_source_keeps_the_bytes_of_what_does_not_change(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    convert_model(source, tmp_path / "fp8", requantize="fp8")
    convert_model(tmp_path / "fp8", tmp_path / "out", to="mha", requantize="fp8")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("fp8", "out"))
    for name, tensor in before.items():
        if ".mlp." in name or ".q_proj." in name or ".o_proj." in name:
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert after["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float8_e4m3fn  # 4 heads of 64 rows
    convert_model(tmp_path / "fp8", tmp_path / "plain", dtype="bfloat16")
    assert entry_of(tmp_path / "plain") is None and open_checkpoint(tmp_path / "plain").is_plain


MIXTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one by one": ("mixtral", {"moe_intermediate_size": 384}, UNCALIBRATED),
    "without whole blocks": ("qwen3_moe", {"moe_intermediate_size": 192}, UNCALIBRATED),
    "fused, with an empty shared expert": ("mixtral", {}, {"to": "mla", **SMALL}),
    "fused, with biases": ("gpt_oss", {}, UNCALIBRATED),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_stock_transformers_loads_experts_with_and_without_dequantising(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    model_type, sizes, settings = MIXTURES[case]
    source = tiny_models.save(model_type, tmp_path / "model", torch.bfloat16, **WIDE, **sizes)
    plan = convert_model(source, tmp_path / "out", **settings, requantize="fp8", dry_run=True)
    convert_model(source, tmp_path / "out", **settings, requantize="fp8")
    assert verify_model(tmp_path / "out", source).passed
    convert_model(source, tmp_path / "plain", **settings)
    name = tiny_models.read_config(tmp_path / "out")["architectures"][0]
    plain, read = (getattr(transformers, name).from_pretrained(tmp_path / f) for f in ("plain", "out"))
    # On a GPU the loader replaces modules by those for FP8, and keeps the codes.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    coded, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    codes, rounded = coded.state_dict(), 0
    for key, values in plain.state_dict().items():
        expected, actual = values, codes[key]
        if f"{key}_scale_inv" in codes:
            matrices = values if values.dim() > 2 else values[None]
            expected = torch.stack([round_to_blocks(matrix) for matrix in matrices]).view_as(values)
            actual = blocks_to_plain(codes[key], codes[f"{key}_scale_inv"], BLOCK).to(torch.bfloat16)
            rounded += ".experts." in key
        assert torch.equal(read.state_dict()[key], expected) and torch.equal(actual, expected), key
    assert codes.keys() - plain.state_dict().keys() == {k for k in codes if k.endswith("_scale_inv")} != set()
    assert rounded == (4 if case == "one by one" else 0)
    assert isinstance(plan, Plan) and any("experts stay in bfloat16" in n for n in plan.notes) == ("fused" in case)


def test_carried_experts_and_fp8_are_refused_together(tmp_path: Path) -> None:
    source = save_gpt_oss(tmp_path / "model")
    with pytest.raises(SettingError, match=r"experts of .* are stored in MXFP4, which cannot stand beside FP8"):
        convert_model(source, tmp_path / "out", **UNCALIBRATED, requantize="fp8")
    assert not (tmp_path / "out").exists()


def test_the_experts_of_gpt_oss_are_carried_over(tmp_path: Path) -> None:
    source, out = save_gpt_oss(tmp_path / "model"), tmp_path / "out"
    result = convert_model(source, out, **UNCALIBRATED)
    assert any("carried over as they are stored" in note for note in result.plan.notes)  # type: ignore[union-attr]
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and entry_of(out) == entry_of(source)
    for name in [n for n in before if n.endswith(("_blocks", "_scales")) or ".mlp." in n]:
        assert torch.equal(before[name], after[name]), name
    assert after["model.layers.0.self_attn.sinks"].shape == (9,)
    assert verify_model(out, source).passed
    convert_model(source, tmp_path / "plain", **UNCALIBRATED, dtype="bfloat16")
    assert entry_of(tmp_path / "plain") is None
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_carried_experts_with_a_scale_that_is_nan_are_refused(tmp_path: Path) -> None:
    source = save_gpt_oss(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.gate_up_proj_scales"][0, 0, 0] = 255
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = r"layers.1.mlp.experts.gate_up_proj_scales in model.safetensors has a scale of 255, the byte for NaN"
    with pytest.raises(HeadwiseError, match=message):
        convert_model(source, tmp_path / "out", **UNCALIBRATED, verify=False)


def test_as_many_groups_as_heads_leave_gpt_oss_as_it_is(tmp_path: Path) -> None:
    source, out = save_gpt_oss(tmp_path / "model"), tmp_path / "out"
    convert_model(source, out, to="gqa", groups=3, dtype="bfloat16")
    parent = open_checkpoint(source)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(parent.read(name), tensor), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requantize": "int8"}, "`requantize` is 'int8'"),
        ({"requantize": "fp8", "dtype": "float32"}, "stores bfloat16 weights: leave out `dtype`"),
        ({"requantize": "fp8"}, "no matrix of this output has whole blocks"),
    ],
)
def test_requantize_that_cannot_be_done(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16)
    with pytest.raises(SettingError, match=message):
        convert_model(source, tmp_path / "out", **UNCALIBRATED, **settings)
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_what_is_stored(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    plan = convert_model(source, tmp_path / "out", to="mqa", requantize="fp8", dry_run=True)
    assert isinstance(plan, Plan) and not plan.exact
    rounded = {action.name: action for action in plan.actions if "rounded to blocks of FP8" in action.reason}
    assert rounded.keys() == {tensor.name for tensor in plan.outputs if tensor.stored} and len(rounded) > 7
    for action in rounded.values():
        assert action.action == "convert" and action.after is not None and action.after[0] == torch.float8_e4m3fn
    convert_model(source, tmp_path / "out", **UNCALIBRATED, requantize="fp8")
    assert plan.disk == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_weights_that_are_not_finite_are_refused_before_they_are_rounded(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HeadwiseError, match=r"up_proj.* holds NaN or infinite"):
        convert_model(source, tmp_path / "out", **UNCALIBRATED, requantize="fp8")


def test_a_folder_in_fp8_computes_what_its_parent_does_with_rounded_weights(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    convert_model(source, tmp_path / "out", requantize="fp8")
    rounded = load_file(tmp_path / "out" / "model.safetensors").keys()
    models = []
    for folder in (source, tmp_path / "out"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        models.append(model.to(torch.float32).eval())
    parent, child = models
    with torch.inference_mode():
        expected = parent(input_ids=tiny_models.tokens()).logits
        for name, parameter in parent.named_parameters():
            if f"{name}_scale_inv" in rounded:
                parameter.copy_(round_to_blocks(parameter))
        same = parent(input_ids=tiny_models.tokens()).logits
        logits = child(input_ids=tiny_models.tokens()).logits
    assert torch.equal(logits, same)
    # A code has three bits behind the leading one; two layers of random weights add up their rounding.
    assert 0 < (logits - expected).norm() < 2**-2 * expected.norm()
