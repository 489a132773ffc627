"""Mixtures of experts in stock classes with MLA: the router and the experts compute the parent's function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headwise import convert_model, inspect_model, verify_model
from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.models import mla_source
from headwise.models.config import stock_text_config
from headwise.models.mla_source import ScaledCopy
from tests import tiny_models
from tests.convert.speaking import TEXT, save_speaking
from tests.io.small import make_checkpoint

MOE: dict[str, Any] = {
    "num_local_experts": 5,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "num_key_value_heads": 4,
    "hidden_size": 64,
    "tie_word_embeddings": False,
}
APPROXIMATE: dict[str, Any] = {"rank": 16, "rope_dim": 8, "refit": "off", **TEXT}


def load(folder: Path) -> Any:
    auto = "AutoModelForCausalLM"
    if "Mistral4ForCausalLM" in tiny_models.read_config(folder)["architectures"]:
        auto = "AutoModelForImageTextToText"
    return (
        getattr(transformers, auto)
        .from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        .eval()
    )


def fuse_experts(folder: Path) -> None:
    """Store every layer's experts as the stock module holds them."""
    tensors = load_file(folder / "model.safetensors")
    state = {n: t.clone() for n, t in load(folder).state_dict().items() if ".mlp." in n}
    kept = {n: t for n, t in tensors.items() if ".mlp." not in n and ".block_sparse_moe." not in n}
    save_file(kept | state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("model_type", "more"),
    [("mixtral", {"rms_norm_eps": 1e-5}), ("granitemoe", {"residual_multiplier": 0.4, "logits_scaling": 3.0})],
)
def test_the_lossless_form_of_a_mixture_of_experts(
    model_type: str, more: dict[str, Any], fused: bool, tmp_path: Path
) -> None:
    source = save_speaking(tmp_path / "model", model_type=model_type, **MOE, **more)
    if fused and model_type == "mixtral":
        fuse_experts(source)
    done: Any = convert_model(source, tmp_path / "out", to="mla", exact=True)
    dropped = [each for each in done.plan.actions if each.action == "drop" and "expert" in each.name]
    assert bool(dropped) == (model_type == "mixtral" and not fused)
    assert all(each.reason.startswith("becomes model.layers.") for each in dropped)
    tokens = torch.arange(24).view(2, 12) + 7
    with torch.inference_mode():
        expected, logits = (load(folder)(input_ids=tokens).logits for folder in (source, tmp_path / "out"))
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert verify_model(tmp_path / "out", source).passed
    inspection = inspect_model(tmp_path / "out")
    assert inspection.layouts[0].kind == "mla" and inspection.model_type == "mistral4"


@pytest.mark.parametrize(
    ("model_type", "normalised", "stock"),
    [
        ("qwen3_moe", True, "Mistral4ForCausalLM"),
        ("qwen3_moe", False, "DeepseekV2ForCausalLM"),
        ("olmoe", True, "Mistral4ForCausalLM"),
        ("olmoe", False, "DeepseekV2ForCausalLM"),
    ],
)
def test_the_experts_compute_the_same_under_norms_on_queries_and_keys(
    model_type: str, normalised: bool, stock: str, tmp_path: Path
) -> None:
    source = save_speaking(tmp_path / "model", model_type=model_type, **MOE, norm_topk_prob=normalised)
    convert_model(source, tmp_path / "out", to="mla", **APPROXIMATE)
    parent, child = load(source), load(tmp_path / "out")
    assert type(child).__name__ == stock
    factor = mla_source.find_mla_source(tiny_models.read_config(source), torch.float32).factors["residual"]
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    for before, after in zip(parent.model.layers, child.model.layers, strict=True):
        with torch.inference_mode():
            expected, actual = (factor * before.mlp(x)), after.mlp(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert expected.abs().max() > 0
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def config_of(model_type: str, **fields: Any) -> dict[str, Any]:
    stock: dict[str, Any] = stock_text_config(model_type, fields).to_dict()
    return stock | {"model_type": model_type}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of("qwen2_moe"), "a learned gate multiplies its shared expert"),
        (config_of("phimoe"), "chooses experts by sparse mixing"),
        (config_of("gpt_oss"), "learned sink in its softmax"),
        (config_of("qwen3_moe", mlp_only_layers=[1]), r"mlp_only_layers is \[1\]: layers without experts"),
        (config_of("qwen3_moe", decoder_sparse_step=2), "decoder_sparse_step is 2: layers without experts"),
    ],
)
def test_what_no_class_holds_is_refused_with_its_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(HeadwiseError, match=reason):
        mla_source.find_mla_source(config)


def test_experts_with_a_gap_are_refused() -> None:
    source = mla_source.find_mla_source(config_of("mixtral"))
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w{i}.weight" for e in range(3) for i in (1, 2, 3)]
    names = [*names, mla_source.EMBEDDING, mla_source.HEAD]
    with pytest.raises(HeadwiseError, match="are incomplete: expert 1 lacks a tensor"):
        mla_source.plan_scaled_copies(source, [n for n in names if "1.w3" not in n], [])


@pytest.mark.parametrize("chunk", [4, 24, 1 << 20])
@pytest.mark.parametrize(
    "copy",
    [
        ScaledCopy("out", "a", 0.3),
        ScaledCopy("out", "a", 0.3, (0, 3)),
        ScaledCopy("out", "a", 1.0, (1, 3)),
        ScaledCopy("out", "a", 0.3, (2, 3)),
        ScaledCopy("out", "a", 0.3, None, (("a", "b"), ("b", "a"))),
    ],
    ids=["whole", "first part", "middle part", "last part", "stack"],
)
def test_the_chunks_of_a_scaled_copy_are_the_scaled_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: ScaledCopy, chunk: int
) -> None:
    monkeypatch.setattr("headwise.io.reader.CHUNK", chunk)
    given = {name: torch.randn(6, 5) for name in "ab"}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", given))
    rows = torch.cat([given[name] for names in copy.stack or (("a",),) for name in names])
    if copy.part:
        rows = rows[2 * copy.part[0] :][:2]
    expected = (rows.double() * copy.factor).bfloat16()
    found = list(copy.chunks(checkpoint, torch.bfloat16))  # no chunk shares its memory with a later one
    assert torch.equal(torch.cat(found), expected.flatten())
    assert expected.numel() == torch.Size(copy.shape((6, 5))).numel()


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    given = {"a": torch.ones(2, 3), "b": torch.ones(3, 3)}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", given))
    copy = ScaledCopy("out", "a", 1.0, None, (("a",), ("b",)))
    with pytest.raises(HeadwiseError, match=r"Tensor b has not the shape \(2, 3\) of a"):
        list(copy.chunks(checkpoint, torch.float32))
