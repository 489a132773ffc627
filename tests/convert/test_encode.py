"""How an output is stored: block FP8 in the stock format, experts of gpt-oss as their source has them, or plain."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headwise import convert_model, inspect_model, verify_model
from headwise.convert import encode
from headwise.convert.plan import Plan
from headwise.errors import HeadwiseError, SettingError
from headwise.io.quantized.dequantize import blocks_to_plain
from headwise.io.quantized.fp8 import BLOCK, round_to_blocks
from headwise.io.quantized.powers import POWERS
from headwise.io.reader import open_checkpoint
from tests import tiny_models
from tests.convert.speaking import TEXT, save_speaking

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


def logits_of(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """The logits of a folder in its stock class, which knows nothing of powers of two."""
    name = tiny_models.read_config(folder)["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()
    tokens = torch.arange(40)[None] * 7 % model.config.vocab_size
    throughout = tiny_models.float64_throughout() if dtype == torch.float64 else nullcontext()
    with torch.no_grad(), throughout:
        logits: torch.Tensor = model(tokens).logits
    return logits


def convert_twice(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Path, Path]:
    """A conversion for llama.cpp, and the same one without powers of two."""
    convert_model(source, home / "powers", **SMALL, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "stores_powers", lambda *_: False)
        convert_model(source, home / "natural", **SMALL, **settings)
    assert POWERS in tiny_models.read_config(home / "powers") and POWERS not in tiny_models.read_config(
        home / "natural"
    )
    return home / "powers", home / "natural"


# 26 layers have one query projection in llama.cpp.
POWERFUL: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "factored": ("llama", torch.bfloat16, {}),
    "float32, odd width": ("llama", torch.float32, {"hidden_size": 212}),
    "one projection": ("llama", torch.bfloat16, {"num_hidden_layers": 26, "intermediate_size": 64}),
    "other epsilon, tied": ("qwen3", torch.bfloat16, {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", POWERFUL)
def test_powers_of_two_for_quantizers_change_no_digit_of_a_logit(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, dtype, sizes = POWERFUL[case]
    settings: dict[str, Any] = {"to": "mla"}
    if model_type == "qwen3":  # its norms on queries and keys need text
        settings |= {"calibrate": "builtin", "calibration_tokens": 2048, "refit": "off"}
    source = tiny_models.save(model_type, tmp_path / "model", dtype, **{**WIDE, **sizes})
    monkeypatch.setitem(SMALL, "calibrate", settings.pop("calibrate", "none"))
    powers, natural = convert_twice(source, tmp_path, monkeypatch, **settings)
    entry = tiny_models.read_config(powers)[POWERS]
    reader = "q_proj" if case == "one projection" else "q_a_proj"
    exponent = entry["kv_a_proj_with_mqa"]
    assert entry == {"input_layernorm": -exponent, "kv_a_proj_with_mqa": exponent, reader: exponent}
    assert 8 <= exponent <= 16

    stored, expected = (load_file(f / "model.safetensors") for f in (powers, natural))
    read = open_checkpoint(powers)
    for name, values in expected.items():
        assert torch.equal(read.read(name), values), name
        changed = name.rpartition(".")[0].rpartition(".")[2] in entry
        assert torch.equal(stored[name], values) != changed, name
    for precision in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(logits_of(powers, precision), logits_of(natural, precision))

    assert verify_model(powers, source).passed and verify_model(powers, hashes=True).passed
    record = json.loads((powers / "headwise.json").read_text())
    assert record[POWERS] == entry and json.loads((natural / "headwise.json").read_text())[POWERS] == {}
    assert "quantizers without options keep this folder" in (powers / "README.md").read_text()
    (verdict,) = inspect_model(powers, engines="llama.cpp").engines
    assert (
        "quantizers without options keep this folder" in verdict.reason and "--tensor-type" in verdict.commands[1]
    )
    (verdict,) = inspect_model(natural, engines="llama.cpp").engines
    assert "rows before the latent norm are near 1e-7" in verdict.reason


def test_the_plan_names_the_powers_and_a_changed_folder_is_not_verified(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    plan = convert_model(source, tmp_path / "out", to="mla", **SMALL, dry_run=True)
    assert isinstance(plan, Plan) and not (tmp_path / "out").exists()
    exponent = plan.config[POWERS]["q_a_proj"]
    assert any(note.startswith(f"input_layernorm is stored times 2^-{exponent}, and") for note in plan.notes)
    action = next(each for each in plan.actions if each.name.endswith("0.input_layernorm.weight"))
    assert (action.action, action.reason) == ("convert", f"stored times 2^-{exponent}")

    convert_model(source, tmp_path / "out", to="mla", **SMALL)
    smaller = [each for each in inspect_model(tmp_path / "out", engines="llama.cpp").options if each.to == "mla"]
    assert smaller, "inspect and a conversion have one verdict on each"
    for each in smaller:
        shape = {"rank": each.kv_lora_rank, "rope_dim": each.qk_rope_head_dim}
        planned = convert_model(tmp_path / "out", tmp_path / "less", to="mla", **{**SMALL, **shape}, dry_run=True)
        assert isinstance(planned, Plan) and POWERS in planned.config
        assert planned.engines[0].reason == each.engines[0].reason

    config = tiny_models.read_config(tmp_path / "out")
    config[POWERS]["q_a_proj"] += 1
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert not verify_model(tmp_path / "out", source).passed


def test_where_powers_of_two_do_not_help_there_are_none(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    for more in ({"engines": "transformers"}, {"engines": ()}, {"requantize": "fp8"}):
        settings: dict[str, Any] = {**SMALL, **more}
        plan = convert_model(source, tmp_path / "out", to="mla", **settings, dry_run=True)
        assert isinstance(plan, Plan) and POWERS not in plan.config
    grouped = convert_model(source, tmp_path / "out", **UNCALIBRATED, engines="llama.cpp", dry_run=True)
    assert isinstance(grouped, Plan) and POWERS not in grouped.config
    experts = tiny_models.save("mixtral", tmp_path / "mixture", torch.bfloat16, **WIDE)
    plan = convert_model(experts, tmp_path / "out", to="mla", **SMALL, dry_run=True)
    assert isinstance(plan, Plan) and POWERS not in plan.config  # its class was not read in llama.cpp


def test_mla_with_a_norm_of_its_own_keeps_its_rows(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    convert_model(source, tmp_path / "out", to="mla", **{**SMALL, "engines": ()})
    config = tiny_models.read_config(tmp_path / "out")
    config["first_k_dense_replace"] = 1  # a config of DeepSeek
    assert not encode.stores_powers(config, ["llama.cpp"])


def test_the_dtype_of_the_output_bounds_the_powers(tmp_path: Path) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        source = tiny_models.save("llama", tmp_path / str(dtype), dtype, **WIDE)
        tensors = load_file(source / "model.safetensors")
        tensors["model.layers.0.input_layernorm.weight"][0] = 2.0**-9
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        plan = convert_model(source, tmp_path / "out", to="mla", **SMALL, dtype="bfloat16", dry_run=True)
        assert isinstance(plan, Plan)
        found.append(plan.config[POWERS])
    assert found[0] == found[1]


@pytest.mark.parametrize(("value", "stored"), [(0.0, False), (2.0**-120, False), (2.0**-10, True)])
def test_norms_decide_how_many_powers_there_are(value: float, stored: bool, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("input_layernorm.weight"):
            tensors[name][...] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = convert_model(source, tmp_path / "out", to="mla", **SMALL, dry_run=True)
    assert isinstance(plan, Plan) and (POWERS in plan.config) == stored
    if stored:
        assert plan.config[POWERS]["q_a_proj"] == math.ceil(-10 + math.log2(256) / 4 + 23 / 2)


def test_a_folder_with_powers_converts_as_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a smaller cache, to sparse attention and to heads."""
    source = save_speaking(tmp_path / "model", torch.bfloat16)
    monkeypatch.setitem(SMALL, "rank", 48)
    monkeypatch.setitem(SMALL, "rope_dim", 8)
    folders = convert_twice(source, tmp_path, monkeypatch, to="mla")
    indexer = {"index_topk": 8, "index_heads": 2, "index_head_dim": 16, "index_steps": 0}
    cases: dict[str, dict[str, Any]] = {
        "smaller": {"to": "mla", "rank": 24, "rope_dim": 8, "refit": "off", **TEXT},
        "smaller, stored alike": {
            "to": "mla",
            "rank": 24,
            "rope_dim": 8,
            "calibrate": "none",
            "engines": "llama.cpp",
        },
        "sparse": {"sparse": "dsa", **indexer, **TEXT},
        "heads": {"to": "mha"},
    }
    for case, settings in cases.items():
        outs = [tmp_path / f"{case}, {folder.name}" for folder in folders]
        for folder, out in zip(folders, outs, strict=True):
            convert_model(folder, out, **settings)
        ours, theirs = map(open_checkpoint, outs)
        assert bool(ours.powers) == bool(theirs.powers) == ("engines" in settings)
        for name in theirs.tensors:
            assert torch.equal(ours.read(name), theirs.read(name)), f"{case}: {name}"
        assert verify_model(outs[0], folders[0]).passed


def test_an_indexer_reads_the_same_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_speaking(tmp_path / "model", torch.bfloat16)
    monkeypatch.setitem(SMALL, "rank", 48)
    monkeypatch.setitem(SMALL, "rope_dim", 8)
    monkeypatch.delitem(SMALL, "calibrate")
    indexer = {"sparse": "dsa", "index_topk": 8, "index_heads": 2, "index_head_dim": 64, "index_steps": 0}
    powers, natural = convert_twice(source, tmp_path, monkeypatch, to="mla", refit="off", **indexer, **TEXT)
    entry = tiny_models.read_config(powers)[POWERS]
    assert entry.keys() == {"input_layernorm", "kv_a_proj_with_mqa", "q_a_proj", "wk", "weights_proj"}
    assert torch.equal(logits_of(powers, torch.float32), logits_of(natural, torch.float32))
    assert verify_model(powers, source).passed
