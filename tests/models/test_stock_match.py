"""Checkpoints in odd shapes: what stock transformers loads is converted, the rest is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.plan import Plan
from headwise.convert.sample import sample_text
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError
from headwise.eval.model import find_model
from headwise.io.reader import open_checkpoint
from headwise.models.stock_match import match_source, require_head
from headwise.recipes.uptrain import uptrain_model
from tests import tiny_models
from tests.convert.speaking import save_speaking

Tensors = dict[str, Tensor]
GQA = {"to": "gqa", "groups": 1, "method": "mean", "calibrate": "none"}


def edit(folder: Path, change: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
    """Change the tensors and the config of a folder; a field that becomes ... is removed."""
    if change:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors = change(tensors) or tensors
        save_file({name: t.clone() for name, t in tensors.items()}, file, {"format": "pt"})
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    return folder


def plan_of(model: Path) -> Plan:
    """The plan of a dry run."""
    plan = convert_model(model, model.parent / "never", **GQA, dry_run=True)
    assert isinstance(plan, Plan)
    return plan


def converted(model: Path) -> tuple[Path, dict[str, Any]]:
    """The verified child with all its heads, which computes what stock transformers computes from the parent."""
    out = model.parent / "child"
    convert_model(model, out, to="mha")
    assert verify_model(out, model).passed
    tokens = tiny_models.tokens()
    logits = []
    for folder in (model, out):
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits.append(network(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    return out, json.loads((out / "config.json").read_text())


def test_stale_buffers_are_dropped_with_a_note(tmp_path: Path) -> None:
    model = edit(
        tiny_models.save("llama", tmp_path / "model"),
        lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}),
    )
    plan = plan_of(model)
    assert [a.name for a in plan.actions if a.action == "drop"] == [
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)
    ]
    assert "2 buffers of old releases" in " ".join(plan.notes) and not plan.warnings
    converted(model)


def test_mask_buffers_are_not_fed_to_the_class(tmp_path: Path) -> None:
    masks = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e4),
    }
    model = edit(tiny_models.save("gpt_neox", tmp_path / "model"), lambda t: t.update(masks))
    convert_model(model, tmp_path / "child", context=512, rope="linear")
    assert not masks.keys() & load_file(tmp_path / "child" / "model.safetensors").keys()


def test_position_ids_of_a_vision_tower_are_dropped(tmp_path: Path) -> None:
    model = tiny_models.save("llava", tmp_path / "model")
    name = next(n for n in load_file(model / "model.safetensors") if n.endswith("position_embedding.weight"))
    buffer = name.replace("position_embedding.weight", "position_ids")
    plan = plan_of(edit(model, lambda t: t.update({buffer: torch.arange(5)[None]})))
    assert [a.name for a in plan.actions if a.action == "drop"] == [buffer] and not plan.warnings


def test_layers_of_multi_token_prediction_are_dropped(tmp_path: Path) -> None:
    def add_layer(tensors: Tensors) -> None:
        tensors |= {n.replace("layers.1.", "layers.2."): t for n, t in tensors.items() if "layers.1." in n}
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(36, 72)

    model = edit(tiny_models.save("glm4_moe", tmp_path / "model"), add_layer, num_nextn_predict_layers=1)
    plan = plan_of(model)
    assert "layer 2 are dropped: the stock class has num_hidden_layers: 2" in " ".join(plan.notes)
    assert not any(".layers.2." in tensor.name for tensor in plan.outputs)
    assert converted(model)[1]["num_nextn_predict_layers"] == 0


def test_a_lowered_number_of_layers_holds(tmp_path: Path) -> None:
    model = edit(tiny_models.save("llama", tmp_path / "model", num_hidden_layers=3), num_hidden_layers=1)
    assert "layers 1 to 2 are dropped" in " ".join(plan_of(model).notes)
    assert inspect_model(model).parameters == plan_of(model).parameters_before
    converted(model)


@pytest.mark.parametrize("model_type", ["qwen3", "mixtral"])
def test_names_of_the_bare_model_get_their_prefix(tmp_path: Path, model_type: str) -> None:
    model = tiny_models.save(model_type, tmp_path / "model")
    edit(model, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    assert "the names of the stock class" in " ".join(plan_of(model).notes)
    out, _ = converted(model)
    assert "model.layers.1.self_attn.k_proj.weight" in load_file(out / "model.safetensors")
    convert_model(model, tmp_path / "lossy", **GQA)


def test_an_own_head_beside_a_tied_flag_stays(tmp_path: Path) -> None:
    model = edit(tiny_models.save("llama", tmp_path / "model"), tie_word_embeddings=True)
    assert "tie_word_embeddings: false is written" in " ".join(plan_of(model).notes)
    assert converted(model)[1]["tie_word_embeddings"] is False


def test_a_stored_copy_of_tied_embeddings_stays_tied(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "model")
    edit(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}), tie_word_embeddings=True)
    assert converted(model)[1]["tie_word_embeddings"] is True


def test_a_tensor_that_no_one_knows_is_dropped_with_a_warning(tmp_path: Path) -> None:
    model = edit(
        tiny_models.save("llama", tmp_path / "model"),
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 36)}),
    )
    assert "1 tensors have no place in LlamaForCausalLM" in plan_of(model).warnings[0]
    converted(model)


def test_a_missing_class_and_dtype_are_filled_in(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "model", torch.bfloat16)
    edit(model, architectures=None, dtype=..., torch_dtype=...)
    assert inspect_model(model).dtype == torch.bfloat16
    _, config = converted(model)
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def lora(tensors: Tensors) -> Tensors:
    renamed = {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in tensors.items()}
    return renamed | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 36)}


def gptq(tensors: Tensors) -> Tensors:
    kept = {name: tensor for name, tensor in tensors.items() if "up_proj" not in name}
    return kept | {"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 40, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (prefixed("_orig_mod."), "begin with '_orig_mod.'"),
        (prefixed("module."), "begin with 'module.'"),
        (prefixed("base_model.model."), "begin with 'base_model.model.'"),
        (lora, "has the tensors of a LoRA adapter"),
        (gptq, "has quantised weights"),
        (lambda t: {n: x.to(torch.int8) for n, x in t.items()}, "has quantised weights"),
        (
            lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"},
            "names a class with a language-model head",
        ),
    ],
)
def test_what_stock_transformers_does_not_load_is_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], reason: str
) -> None:
    model = edit(tiny_models.save("llama", tmp_path / "model"), change)
    for refused in (lambda: plan_of(model), lambda: inspect_model(model)):
        with pytest.raises(HeadwiseError, match=reason):
            refused()


@pytest.mark.parametrize(
    ("name", "prefix"), [("LlamaModel", ""), ("LlamaForCausalLM", ""), ("LlamaModel", "model.")]
)
def test_a_base_model_without_a_head_converts_within_its_class(tmp_path: Path, name: str, prefix: str) -> None:
    model = save_speaking(tmp_path / "model", num_key_value_heads=4, tie_word_embeddings=False)
    transformers.AutoModel.from_pretrained(model).save_pretrained(model)
    edit(model, prefixed(prefix), architectures=[name])
    checkpoint = match_source(open_checkpoint(model))
    assert checkpoint.headless and "without a language-model head" in " ".join(checkpoint.notes)
    out = tmp_path / "mha"
    convert_model(model, out, to="mha")
    tokens = torch.arange(12)[None]
    expected, actual = (
        transformers.AutoModel.from_pretrained(folder)(tokens).last_hidden_state for folder in (model, out)
    )
    assert torch.allclose(actual, expected, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["architectures"] == [name]
    result = convert_model(model, tmp_path / "mqa", to="mqa", calibrate="auto", calibration_tokens=512)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    assert result.text_loss is None and result.plan.arguments["calibration"]["text"] == "mixture"
    for refused, words in (
        ({"to": "mla", "exact": True}, "without a language-model head"),
        ({"to": "mqa", "calibrate": "sampled"}, "has none"),
        ({"to": "mqa", "refit": "joint"}, "has no head"),
    ):
        with pytest.raises(HeadwiseError, match=words):
            convert_model(model, tmp_path / "other", **refused, dry_run=True)  # type: ignore[arg-type]
    # A class with a head and names with the prefix do not show that there was no head.
    for folder in (model, out, tmp_path / "mqa") if name == "LlamaModel" else (model,):
        assert match_source(open_checkpoint(folder)).headless
        with pytest.raises(HeadwiseError, match="without a language-model head, and text is sampled"):
            sample_text(folder, tmp_path / "x.jsonl")
        with pytest.raises(HeadwiseError, match="without a language-model head, and its text is scored"):
            find_model(folder)
        with pytest.raises(HeadwiseError, match="without a language-model head, and the training compares"):
            uptrain_model(folder, tmp_path / "trained", teacher=model)
    assert not (tmp_path / "trained").exists()
    assert [w for w in result.plan.warnings if "is foreign to the model" in w]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_a_head_is_not_refused(tmp_path: Path, tied: bool) -> None:
    model = save_speaking(tmp_path / "model", tie_word_embeddings=tied)
    require_head(open_checkpoint(model), "it is needed")
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (model / "config.json").write_text(json.dumps(config))
    assert match_source(open_checkpoint(model)).headless == tied


def test_a_classifier_is_not_evaluated(tmp_path: Path) -> None:
    model = save_speaking(tmp_path / "model", tie_word_embeddings=True)
    config = transformers.AutoConfig.from_pretrained(model)
    transformers.LlamaForSequenceClassification(config).save_pretrained(model)
    with pytest.raises(HeadwiseError, match="LlamaForSequenceClassification is no language model"):
        find_model(model)


def test_a_model_with_a_missing_tensor_is_not_evaluated(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "model")
    edit(model, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(HeadwiseError, match=r"has no lm_head\.weight"):
        find_model(model)


def test_an_adapter_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(HeadwiseError, match="a LoRA adapter beside the weights") as error:
        plan_of(model)
    assert "Merge the adapter" in str(error.value.hint)
    (model / "model.safetensors").unlink()
    with pytest.raises(HeadwiseError, match="a LoRA adapter and no weights"):
        plan_of(model)
    (model / "config.json").unlink()
    with pytest.raises(HeadwiseError, match="a LoRA adapter and no model"):
        plan_of(model)


def test_a_tensor_that_the_index_does_not_assign_is_read_as_stock_transformers_reads_it(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    names = load_file(model / "model-00001-of-00001.safetensors").keys() - {"model.norm.weight"}
    index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(names), "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    converted(model)


def test_more_labels_than_a_tensor_has_rows_are_refused(tmp_path: Path) -> None:
    model = tiny_models.save("llama", tmp_path / "m")
    rows = max(size for tensor in load_file(model / "model.safetensors").values() for size in tensor.shape)
    plan_of(edit(model, num_labels=rows))
    with pytest.raises(HeadwiseError, match=f"num_labels for {rows + 1} labels, and the most is {rows}"):
        plan_of(edit(model, num_labels=rows + 1))


EXPERTS = "model.layers.0.block_sparse_moe.experts"


def without(*names: str) -> Callable[[Tensors], Any]:
    """Remove tensors."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def shaped(name: str, *shape: int) -> Callable[[Tensors], Any]:
    """Give a tensor another shape."""
    return lambda tensors: tensors | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "config", "message", "remedy"),
    [
        (without(f"{EXPERTS}.2.w3.weight"), {}, r"0\.block_sparse_moe\.experts\.2\.w3\.weight is missing", "again"),
        (
            without(*(f"{EXPERTS}.3.w{i}.weight" for i in (1, 2, 3))),
            {},
            r"0\.block_sparse_moe\.experts\.3\.w[123]\.weight is missing in model\.safetensors",
            "again",
        ),
        (
            shaped(f"{EXPERTS}.2.w3.weight", 5, 7),
            {},
            r"experts\.2\.w3\.weight has shape \(5, 7\) in model",
            "again",
        ),
        (
            shaped("model.layers.0.block_sparse_moe.gate.weight", 6, 36),
            {},
            r"tensor model\.layers\.0\.block_sparse_moe\.gate\.weight has shape \(6, 36\) in model\.safetensors",
            "again",
        ),
        (
            without("model.layers.0.block_sparse_moe.gate.weight"),
            {},
            r"model\.layers\.0\.block_sparse_moe\.gate\.weight is missing in model\.safetensors",
            "again",
        ),
        (
            None,
            {"num_local_experts": 3},
            r"num_local_experts: 3, and the files of .* hold 4 experts",
            "config.json",
        ),
        (
            None,
            {"num_local_experts": 6},
            r"num_local_experts: 6, and the files of .* hold 4 experts",
            "config.json",
        ),
        (
            None,
            {"intermediate_size": 8},
            r"the stack of model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight and others has shape",
            "again",
        ),
    ],
)
def test_incomplete_experts_are_named_as_the_file_names_them(
    change: Callable[[Tensors], Any] | None, config: dict[str, Any], message: str, remedy: str, tmp_path: Path
) -> None:
    model = edit(tiny_models.save("mixtral", tmp_path / "model"), change, **config)
    with pytest.raises(HeadwiseError, match=message) as refusal:
        inspect_model(model)
    assert remedy in (refusal.value.hint or "")


def test_fused_experts_are_counted(tmp_path: Path) -> None:
    model = edit(tiny_models.save("granitemoe", tmp_path / "model"), num_local_experts=6)
    with pytest.raises(HeadwiseError, match=r"num_local_experts: 6, and the files of .* hold 4 experts"):
        inspect_model(model)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        (
            "qwen3",
            without("model.layers.1.self_attn.q_norm.weight"),
            r"q_norm\.weight is missing in model\.safetensors",
        ),
        ("qwen3", shaped("model.layers.1.self_attn.k_norm.weight", 5), r"k_norm\.weight has shape \(5,\) in model"),
        ("gpt_oss", without("model.layers.0.self_attn.sinks"), r"sinks is missing in model\.safetensors"),
    ],
)
def test_a_norm_or_sinks_that_do_not_fit_have_a_remedy(
    model_type: str, change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    model = edit(tiny_models.save(model_type, tmp_path / "model"), change)
    with pytest.raises(HeadwiseError, match=message) as refusal:
        inspect_model(model)
    assert "Download the folder again" in (refusal.value.hint or "")


def test_dropped_multi_token_prediction_is_a_warning(tmp_path: Path) -> None:
    mtp = {"mtp.fc.weight": torch.ones(2, 2), "mtp.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
    model = edit(tiny_models.save("qwen3_next", tmp_path / "model"), lambda tensors: tensors | mtp)
    plan = plan_of(model)
    assert [action.name for action in plan.actions if action.action == "drop"] == list(mtp)
    assert "2 tensors of multi-token prediction have no place in Qwen3NextForCausalLM" in plan.warnings[0]
