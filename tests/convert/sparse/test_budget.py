"""Folders with sparse attention from end to end: dense up to the budget of keys, and refusals of what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV32ForCausalLM

from headwise import convert_model, inspect_model, uptrain_model, verify_model
from headwise.convert.forecast import amounts
from headwise.convert.pipeline import ConvertResult
from headwise.convert.plan import Plan
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import open_checkpoint
from tests.convert.speaking import TEXT, save_speaking
from tests.test_bad_input import refused

SPARSE: dict[str, Any] = {"sparse": "dsa", "index_topk": 9, "index_heads": 3, "index_steps": 2, **TEXT}


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


# Odd counts of heads; biases on queries, keys and values; another epsilon; layers without rotary embeddings.
@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "rms_norm_eps": 1e-5}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("smollm3", {"num_key_value_heads": 4, "num_hidden_layers": 4, "pad_token_id": 0}),
    ],
)
def test_up_to_the_budget_the_output_is_the_dense_parent(
    model_type: str, more: dict[str, Any], tmp_path: Path
) -> None:
    source = save_speaking(tmp_path / "model", model_type=model_type, **more)
    result = convert_model(source, tmp_path / "out", **SPARSE)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    assert "selection" in [check.name for check in result.verification.checks]
    tokens = torch.arange(2 * 25).view(2, 25) * 5 % 256 + 1
    expected, actual = logits(source, tokens), logits(tmp_path / "out", tokens)
    error = (actual - expected).abs().amax(-1) / expected.abs().max()
    assert float(error[:, :9].max()) < 1e-5
    assert float(error[:, 12:].max()) > 1e-3  # beyond it keys are left out

    # The stock class alone saves the folder and loads it again.
    model = DeepseekV32ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again", tokens), actual)

    inspection = inspect_model(tmp_path / "out")
    layout = inspection.layouts[0]
    assert any("every query attends to 9 keys, which 3 index queries" in note for note in inspection.notes)
    assert layout.indexer is not None and layout.indexer.index_topk == 9 and layout.indexer.index_n_heads == 3
    row = (layout.kv_lora_rank or 0) + (layout.qk_rope_head_dim or 0) + layout.indexer.index_head_dim
    assert layout.cache_elements_per_token == row
    assert result.plan.cache_after.bytes_per_token == len(result.plan.layouts_after) * row * 4
    assert not result.plan.exact
    card = (tmp_path / "out" / "README.md").read_text()
    assert "top 9 keys" in card
    record = json.loads((tmp_path / "out" / "headwise.json").read_text())
    assert record["arguments"]["index_topk"] == 9 and record["layers"]["1"]["indexer"]["steps"] == 2


def test_a_smaller_cache_with_indexers(tmp_path: Path) -> None:
    source = save_speaking(tmp_path / "model")
    result = convert_model(source, tmp_path / "out", to="mla", rank=16, rope_dim=8, refit=3, **SPARSE)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    dense = convert_model(source, tmp_path / "dense", to="mla", rank=16, rope_dim=8, refit=3, **TEXT)
    assert isinstance(dense, ConvertResult)
    tokens = torch.arange(9)[None] + 40
    expected, actual = (logits(tmp_path / name, tokens) for name in ("dense", "out"))
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-3  # of another norm of the queries
    assert result.layers[0]["refit"] == dense.layers[0]["refit"]


def test_a_wrong_indexer_fails_the_check(tmp_path: Path) -> None:
    """A folder whose index keys leave the linear range of their norm."""
    source = save_speaking(tmp_path / "model")
    convert_model(source, tmp_path / "out", **SPARSE)
    assert verify_model(tmp_path / "out", source).passed
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.indexer.k_norm.weight"
    tensors[name] = 1e4 * tensors[name] + 1
    tensors["model.layers.1.self_attn.indexer.wk.weight"] *= 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    failed = [check.name for check in verify_model(tmp_path / "out").checks if not check.passed]
    assert "selection" in failed


def test_the_plan_has_a_budget_and_a_width_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amounts, "REFIT_SECONDS", 3600.0)  # a machine with other work is slow
    source = save_speaking(tmp_path / "model", max_position_embeddings=160)
    plan = convert_model(source, tmp_path / "out", sparse="dsa", dry_run=True)
    assert isinstance(plan, Plan)
    # All 8 KV heads of 8 rotary dimensions are in the rotary key.
    assert (plan.config["index_topk"], plan.config["index_n_heads"], plan.config["index_head_dim"]) == (20, 8, 128)
    assert plan.config["architectures"] == ["DeepseekV32ForCausalLM"] and plan.config["q_lora_rank"] == 48
    assert "every query attends to 20 keys" in str(plan)
    longer = convert_model(source, tmp_path / "out", sparse="dsa", context=20_480, dry_run=True)
    assert isinstance(longer, Plan) and longer.config["index_topk"] == 2048
    # The forecast decides about training where the settings do not.
    assert "Indexers: 300 steps per layer" in str(longer) and longer.seconds["indexers"] > 0
    slow = {"sparse": "dsa", "index_heads": 32768, "index_head_dim": 2048, "dry_run": True}
    untrained, named = (
        convert_model(source, tmp_path / "out", **slow, **more) for more in ({}, {"index_steps": 300})
    )
    assert "Indexers: the closed form" in str(untrained) and "Indexers: 300 steps" in str(named)
    assert isinstance(named, Plan) and named.seconds["indexers"] > 3600 and named.peak_memory > longer.peak_memory


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--sparse", "dsa", "--index-topk", "32"),
            "--index-topk is 32, and the context of the output is 32 tokens",
        ),
        (("--sparse", "dsa", "--index-head-dim", "64"), "holds 64 rotary elements and one more"),
        (("--sparse", "nsa"), "is 'nsa', which is not one of dsa"),
        (("--index-topk", "8", "--to", "mqa"), "--index-topk needs --sparse"),
        (("--sparse", "dsa", "--to", "mqa"), "--sparse acts only with --to mla"),
        (("--sparse", "dsa", "--calibrate", "none"), "makes indexers from calibration text"),
        (
            ("--sparse", "dsa", "--to", "mla", "--cache", "0.25", "--refit", "joint"),
            "that the indexers of --sparse",
        ),
    ],
)
def test_a_wrong_setting_gets_one_sentence(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    message = refused(save_speaking(tmp_path / "model"), "", *options)
    assert words in " ".join(message.split())


def test_training_refuses_a_folder_with_indexers(tmp_path: Path) -> None:
    source = save_speaking(tmp_path / "model")
    convert_model(source, tmp_path / "out", **SPARSE)
    with pytest.raises(HeadwiseError, match="has indexers, and training would change"):
        uptrain_model(tmp_path / "out", tmp_path / "trained", teacher=source, recipe="layerwise", device="cpu")


def test_a_source_with_a_window(tmp_path: Path) -> None:
    model = save_speaking(tmp_path / "model", model_type="mistral", sliding_window=8)
    assert "sliding_window is 8" in refused(model, "", "--sparse", "dsa")


def test_a_source_with_experts(tmp_path: Path) -> None:
    model = save_speaking(tmp_path / "model", model_type="mixtral", num_local_experts=3)
    assert "no stock class with an indexer" in " ".join(refused(model, "", "--sparse", "dsa").split())


def test_a_sparse_source(tmp_path: Path) -> None:
    source = save_speaking(tmp_path / "model")
    convert_model(source, tmp_path / "sparse" / "out", **SPARSE)
    for options in (("--sparse", "dsa"), ("--to", "mqa")):
        message = refused(tmp_path / "sparse" / "out", "", *options, out=tmp_path / "again")
        assert "is a deepseek_v32 model, which has indexers already" in " ".join(message.split())
    with pytest.raises(SettingError, match="index_steps"):
        convert_model(source, tmp_path / "x", sparse="dsa", index_steps=-1)


# The lossless form; biases, and query factors of the smallest rank; a rounded one; queries in factors already.
@pytest.mark.parametrize(
    ("model_type", "dtype", "more", "shape"),
    [
        ("llama", torch.float32, {"rms_norm_eps": 1e-5}, {"exact": True}),
        ("qwen2", torch.float32, {"num_key_value_heads": 2}, {"rank": 16, "rope_dim": 8, "refit": 3}),
        (
            "llama",
            torch.bfloat16,
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            {"rank": 16, "rope_dim": 8},
        ),
        ("llama", torch.float32, {}, {"rank": 16, "rope_dim": 8, "engines": "llama.cpp"}),
    ],
)
def test_a_source_with_mla_keeps_its_function_and_gets_indexers(
    model_type: str, dtype: torch.dtype, more: dict[str, Any], shape: dict[str, Any], tmp_path: Path
) -> None:
    source = save_speaking(tmp_path / "model", dtype, model_type=model_type, **more)
    convert_model(source, tmp_path / "mla", to="mla", **shape, **({} if "exact" in shape else TEXT))
    result = convert_model(tmp_path / "mla", tmp_path / "out", **SPARSE)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    assert "exact: attention of all layers" in {c.name: c.detail for c in result.verification.checks}["parent"]
    before, after = (open_checkpoint(tmp_path / name) for name in ("mla", "out"))
    changed = {
        n for n in before.tensors if n not in after.tensors or not torch.equal(before.read(n), after.read(n))
    }
    assert all(".q_" in name for name in changed)
    tokens = torch.arange(2 * 25).view(2, 25) * 5 % 256 + 1
    expected, actual = logits(tmp_path / "mla", tokens), logits(tmp_path / "out", tokens)
    error = (actual - expected).abs().amax(-1) / expected.abs().max()
    assert float(error[:, :9].max()) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert float(error[:, 12:].max()) > 1e-1  # beyond the budget keys are left out
    assert verify_model(tmp_path / "out", tmp_path / "mla").passed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "mqa"), "which has MLA already, and no key-value heads to merge"),
        (("--dtype", "float32"), "which has MLA already"),
        (("--sparse", "dsa", "--to", "mla", "--cache", "50%"), "--cache acts on the model that"),
        (("--sparse", "dsa", "--context", "64"), "--context acts on the model that"),
        (("--sparse", "dsa", "--index-topk", "32"), "and the context of the output is 32 tokens"),
    ],
)
def test_what_a_source_with_mla_cannot_become(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    convert_model(save_speaking(tmp_path / "model"), tmp_path / "home" / "mla", to="mla", exact=True)
    message = refused(tmp_path / "home" / "mla", "", *options, out=tmp_path / "again")
    assert words in " ".join(message.split())


def test_a_source_with_mla_and_experts(tmp_path: Path) -> None:
    source = save_speaking(tmp_path / "model", model_type="mixtral", num_local_experts=3)
    convert_model(source, tmp_path / "home" / "mla", to="mla", exact=True)
    message = refused(tmp_path / "home" / "mla", "", "--sparse", "dsa", out=tmp_path / "again")
    assert "is a mistral4 model, which no stock class with an indexer replaces" in " ".join(message.split())
