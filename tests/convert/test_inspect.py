"""The inspection of a model: its attention, its cache and its possible layouts, without reading a tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, LlamaForCausalLM, PhiConfig

from headwise.compat import cache_of
from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.plan import Plan
from headwise.errors import HeadwiseError, SettingError
from headwise.io.source import EMBEDDED_MODEL
from headwise.models.layout import AttentionLayout, CacheSize
from headwise.serving.engines import ENGINES
from tests import small_parents, tiny_models
from tests.convert.test_plan import llama_config, model

__all__ = ["model"]

SHARED = Path(__file__).parents[3] / "shared" / "configs"


def test_the_inspection_equals_the_stock_class(model: Path) -> None:
    inspection = inspect_model(model)
    stock = LlamaForCausalLM.from_pretrained(model)
    assert (inspection.parameters, inspection.parameters_from) == (
        sum(p.numel() for p in stock.parameters()),
        "headers",
    )
    assert inspection.dtype == torch.bfloat16 and [x.kind for x in inspection.layouts] == ["mha"] * 3
    past = cache_of(stock(torch.arange(10)[None], use_cache=True))
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert inspection.cache.bytes_per_token * 10 == num_bytes
    context = stock.config.max_position_embeddings
    assert inspection.cache.at == {context: inspection.cache.bytes_per_token * context}


def test_options_and_their_savings(model: Path) -> None:
    inspection = inspect_model(model)
    heads = {(o.to, o.num_key_value_heads): o.saved for o in inspection.options if o.num_key_value_heads}
    assert heads == {("mqa", 1): 7 / 8, ("gqa", 2): 3 / 4, ("gqa", 4): 1 / 2}
    latents = [(o.kv_lora_rank, o.qk_rope_head_dim) for o in inspection.options if o.to == "mla"]
    assert inspection.mla is None and latents == [(28, 4)], "64 elements are less than a row that engines have"
    assert inspection.notes[0].startswith("The sizes of MLA are examples. ")


@pytest.mark.parametrize(
    ("heads", "groups", "width", "engines"),
    [(9, 3, 64, ()), (8, 8, 64, ()), (32, 8, 64, ()), (9, 3, 64, "sglang"), (32, 8, 64, "vllm"), (8, 4, 8, "vllm")],
)
def test_half_of_the_cache_is_an_option_and_is_that_of_the_plan(
    tmp_path: Path, heads: int, groups: int, width: int, engines: Any
) -> None:
    shape: dict[str, Any] = {
        "hidden_size": width * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }
    shape |= {"head_dim": width, "num_hidden_layers": 1, "attention_bias": False}
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, **shape)
    inspection = inspect_model(source, engines=engines)
    plan = convert_model(source, tmp_path / "out", to="mla", cache=0.5, engines=engines, dry_run=True)
    assert isinstance(plan, Plan)
    rows = {(o.kv_lora_rank, o.qk_rope_head_dim): o.engines for o in inspection.options if o.to == "mla"}
    layout = plan.layouts_after[0]
    assert rows[layout.kv_lora_rank, layout.qk_rope_head_dim] == plan.engines


def test_a_model_without_a_listed_mla_has_a_note(tmp_path: Path) -> None:
    config = llama_config(num_key_value_heads=1, num_attention_heads=1, head_dim=2, hidden_size=8)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    inspection = inspect_model(tmp_path)
    assert inspection.mla is None and "mla" not in {option.to for option in inspection.options}
    assert inspection.notes[0].startswith(
        "MLA is possible, and no size of it is listed. `headwise convert MODEL OUT"
    )


def test_only_heads_that_a_conversion_can_make_are_options(tmp_path: Path) -> None:
    shape = {"hidden_size": 48, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(llama_config(**shape).to_dict()))
    options = [o.num_key_value_heads for o in inspect_model(tmp_path).options if o.num_key_value_heads]
    assert options == [1, 2, 4, 24], "3, 6 and 12 divide the query heads, and are no groups or copies of 8"


def test_mla_is_an_option_where_it_saves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(llama_config(hidden_size=4096, num_attention_heads=32).to_dict())
    )
    inspection = inspect_model(tmp_path)
    latents = {o.kv_lora_rank: o.cache.bytes_per_token for o in inspection.options if o.to == "mla"}
    half = {4032: 3 * 4096 * 2}
    assert latents == {rank: 3 * (rank + 64) * 2 for rank in (256, 448, 512)} | half


def test_a_forecast_and_verdicts_of_every_layout(tmp_path: Path) -> None:
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(llama_config(**shape).to_dict()))
    plain = inspect_model(tmp_path)
    assert plain.serving is None and len(plain.notes) == 1
    assert all(tuple(v.name for v in each.engines) == ENGINES for each in (plain, *plain.options))
    assert plain.engines[0].verdict == "loads"
    found = inspect_model(tmp_path, tp=8, engines=["vllm", "llama.cpp"])
    assert found.serving is not None and found.serving.cache_bytes_per_token == 3 * 256 * 2
    latent = {o.kv_lora_rank: o for o in found.options if o.to == "mla"}
    assert {rank: o.serving.cache_bytes_per_token for rank, o in latent.items() if o.serving} == {
        rank: 3 * (rank + 64) * 2 for rank in (256, 448, 512, 960)
    }
    # Heads of 128, and a depth at which llama.cpp needs two factors.
    assert [verdict.verdict for verdict in latent[512].engines] == ["loads", "command"]
    assert "attn_q_a" in latent[512].engines[1].commands[1]
    assert any("MLA 512+64 does not pay at tensor parallel 8" in note for note in found.notes)
    assert any(note.startswith("MQA, GQA-2 and GQA-4 save no cache at tensor parallel 8") for note in found.notes)
    with pytest.raises(SettingError, match="does not divide the 32 query heads"):
        inspect_model(tmp_path, tp=3)


@pytest.mark.parametrize(
    ("model_type", "engine", "fields"),
    [
        ("llama", "transformers", {"attention_bias": False, "tie_word_embeddings": True}),
        ("llama", "vllm", {"attention_bias": False, "tie_word_embeddings": True}),
        ("llama", "llama.cpp", {"attention_bias": False, "tie_word_embeddings": False}),
        ("llama", "transformers", {"attention_bias": True}),
        ("qwen2", "transformers", {"use_sliding_window": False, "max_window_layers": 0}),
    ],
)
def test_the_weights_of_mla_are_those_of_the_plan(
    tmp_path: Path, model_type: str, engine: str, fields: dict[str, Any]
) -> None:
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    source = tiny_models.save(model_type, tmp_path / "model", torch.bfloat16, **shape | fields)
    inspection = inspect_model(source, engines=engine, tp=1)
    option = next(option for option in inspection.options if option.kv_lora_rank == 256)
    shape = {"rank": option.kv_lora_rank, "rope_dim": option.qk_rope_head_dim}
    plan = convert_model(source, tmp_path / "out", to="mla", engines=engine, dry_run=True, **shape)
    assert isinstance(plan, Plan) and inspection.serving and option.serving
    assert inspection.serving.weight_bytes == plan.bytes_before
    assert option.serving.weight_bytes == plan.bytes_after
    assert option.engines == plan.engines[: len(option.engines)]


def test_the_weights_of_a_smaller_latent_are_those_of_the_plan(tmp_path: Path) -> None:
    source = tiny_models.save("deepseek_v3", tmp_path / "model")
    inspection = inspect_model(source, tp=1)
    plan = convert_model(source, tmp_path / "out", to="mla", cache=0.5, dry_run=True)
    assert isinstance(plan, Plan) and inspection.serving and inspection.options[0].serving
    assert inspection.serving.weight_bytes == plan.bytes_before
    assert inspection.options[0].serving.weight_bytes == plan.bytes_after


def test_the_reason_against_mla_is_given(tmp_path: Path) -> None:
    config = PhiConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=32)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    inspection = inspect_model(tmp_path)
    assert "cannot become MLA" in (inspection.mla or "") and "mla" not in {o.to for o in inspection.options}


@pytest.mark.parametrize(("model_type", "approximate"), [("qwen3", True), ("llama", False), ("olmo2", False)])
def test_norms_on_queries_and_keys_make_mla_approximate(tmp_path: Path, model_type: str, approximate: bool) -> None:
    inspection = inspect_model(tiny_models.save(model_type, tmp_path / "model"))
    assert any("MLA is approximate" in note for note in inspection.notes) == approximate
    assert (inspection.mla is None) == (model_type != "olmo2")


def test_a_window_bounds_the_cache() -> None:
    full = AttentionLayout(8, 2, 16, 16, 16)
    window = AttentionLayout(8, 2, 16, 16, 16, sliding_window=4096)
    cache = CacheSize.of([full, window], torch.float16)
    assert cache.bytes_per_token == 2 * 64 * 2
    assert cache.at == {n: 64 * 2 * (n + 4096) for n in (8192, 32768, 131072)}


@pytest.mark.parametrize(
    ("metadata", "parameters", "origin"),
    [
        ({"total_size": 1000}, 500, "index"),
        ({"total_size": 1000, "total_parameters": 499}, 499, "index"),
        ({}, 28_896, "config"),
        ({"total_parameters": 10**400, "total_size": -2}, 28_896, "config"),
        ("x", 28_896, "config"),
    ],
)
def test_an_index_without_weights(tmp_path: Path, metadata: Any, parameters: int, origin: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config().to_dict()))
    index = {"metadata": metadata, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    inspection = inspect_model(tmp_path, card="l4")
    assert (inspection.parameters, inspection.parameters_from) == (parameters, origin)


def test_a_config_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config().to_dict()))
    assert inspect_model(tmp_path).parameters is None
    inspection = inspect_model(tmp_path, context=4096, tp=1)
    stock = LlamaForCausalLM(llama_config())
    assert inspection.parameters == stock.num_parameters() and inspection.parameters_from == "config"
    assert inspection.rope_ranges[0].context == 4096
    assert json.loads(json.dumps(inspection.to_dict()))["layers"][0]["kind"] == "mha"


def test_a_truncated_file_is_an_error(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(HeadwiseError, match="truncated"):
        inspect_model(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="there are no shared configs")
@pytest.mark.parametrize("folder", sorted(SHARED.glob("*/")), ids=lambda path: path.name)
def test_every_shared_config_is_inspected_or_refused_in_one_sentence(folder: Path) -> None:
    try:
        inspection = inspect_model(folder)
    except HeadwiseError as error:
        assert "\n" not in str(error)
        return
    assert inspection.cache.bytes_per_token > 0 and json.dumps(inspection.to_dict())


def latent_folder(folder: Path, **fields: Any) -> Path:
    """A folder with the config of a DeepSeek-V3."""
    config = DeepseekV3Config(num_hidden_layers=2, architectures=["DeepseekV3ForCausalLM"]).to_dict()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_smaller_caches_of_a_model_with_mla_are_options(tmp_path: Path) -> None:
    inspection = inspect_model(latent_folder(tmp_path / "model"))
    assert inspection.mla is None and "approximate" in " ".join(inspection.notes)
    found = {o.name: (o.to, o.cache.bytes_per_token, round(o.saved, 3)) for o in inspection.options}
    assert found == {
        "MLA 224+64": ("mla", 2 * 288 * 4, 0.5),
        "MLA 256+64": ("mla", 2 * 320 * 4, round(1 - 320 / 576, 3)),
        "MLA 448+64": ("mla", 2 * 512 * 4, round(1 - 512 / 576, 3)),
    }
    assert [o.name for o in inspect_model(tmp_path / "model", engines="sglang").options] == [
        "MLA 224+64",
        "MLA 256+64",
    ]


@pytest.mark.parametrize("model_type", sorted(tiny_models.LATENTS))
def test_an_option_of_a_model_with_mla_is_what_a_conversion_makes(model_type: str, tmp_path: Path) -> None:
    source = tiny_models.save(model_type, tmp_path / "model")
    option = inspect_model(source).options[0]
    plan = convert_model(source, tmp_path / "out", to="mla", cache=0.5, dry_run=True)
    assert isinstance(plan, Plan)
    assert option.cache == plan.cache_after and option.engines == plan.engines


def test_the_exact_way_to_heads_is_an_option(tmp_path: Path) -> None:
    parent = small_parents.parent(tmp_path / "parent", "qwen2")
    mla = small_parents.converted(parent, tmp_path / "mla", to="mla", rank=12, rope_dim=4)
    inspection = inspect_model(mla)
    assert inspection.options[-1].name == "MHA" and inspection.options[-1].saved < 0
    plan = convert_model(mla, tmp_path / "out", to="mha", dry_run=True)
    assert isinstance(plan, Plan)
    assert inspection.options[-1].cache == plan.cache_after and inspection.options[-1].engines == plan.engines
    tensors = load_file(mla / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"] += 1
    save_file(tensors, mla / "model.safetensors", metadata={"format": "pt"})
    assert {o.to for o in inspect_model(mla).options} == {"mla"}, "the class with heads has no such bias"


def test_a_dense_config_without_rope_parameters_has_the_way_to_heads(tmp_path: Path) -> None:
    folder = latent_folder(tmp_path / "model", first_k_dense_replace=2)
    config = tiny_models.read_config(folder)
    for name in ("rope_parameters", "rope_scaling"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect_model(folder).options[-1].name == "MHA"


def test_a_model_with_indexers_becomes_no_other_mla(tmp_path: Path) -> None:
    indexers = {"index_topk": 2048, "index_n_heads": 4, "index_head_dim": 128, "first_k_dense_replace": 2}
    names = {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}
    inspection = inspect_model(latent_folder(tmp_path / "model", **indexers, **names))
    assert not inspection.options and "its indexers fit no other" in (inspection.mla or "")


def test_a_quantised_config_without_dtype_is_read_in_bfloat16(tmp_path: Path) -> None:
    config = llama_config().to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    config["architectures"] = ["LlamaForCausalLM"]
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    inspection = inspect_model(tmp_path)
    assert inspection.dtype == torch.bfloat16
    layout = inspection.layouts[0]
    assert inspection.cache.bytes_per_token == len(inspection.layouts) * layout.cache_elements_per_token * 2
    verdicts = {verdict.name: verdict.verdict for verdict in inspection.engines}
    assert (
        inspection.serving is None
        and verdicts.pop("transformers") == "loads"
        and set(verdicts.values()) == {"unknown"}
    )
    assert all("in mxfp4 was not read" in verdict.reason for verdict in inspection.engines[1:])


@pytest.mark.parametrize("headers", [True, False])
def test_a_conversion_fills_in_the_class_that_config_json_does_not_name(headers: bool, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model")
    fields = json.loads((source / "config.json").read_text()) | {"architectures": None}
    (source / "config.json").write_text(json.dumps(fields))
    if not headers:
        (source / "model.safetensors").unlink()
    found = inspect_model(source)
    assert [verdict.verdict for verdict in found.engines] == ["loads", "wrong", "no", "no"]
    grouped = next(option for option in found.options if option.to == "mqa")
    assert {verdict.verdict for verdict in grouped.engines} == {"loads"}


def test_a_refusal_is_the_verdict_of_the_engines_that_it_concerns(tmp_path: Path) -> None:
    shape = {"hidden_size": 1280, "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 80}
    config = llama_config(**shape).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_model(tmp_path, tp=4)
    assert found.serving is not None and found.serving.refusal is not None
    verdicts = {verdict.name: verdict for verdict in found.engines}
    for name in ("vllm", "sglang"):
        assert (verdicts[name].verdict, verdicts[name].reason) == ("refused", found.serving.refusal)
        assert not verdicts[name].serves and not verdicts[name].commands
    assert verdicts["transformers"].verdict == "loads", "it takes no `tp`"
    divided = {verdict.name: verdict for verdict in inspect_model(tmp_path, tp=10, dcp=2).engines}
    assert divided["vllm"].verdict == divided["sglang"].verdict == "refused"
    assert "vLLM 0.33 divides" in divided["vllm"].reason and "SGLang 0.5.23 divides" in divided["sglang"].reason
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NovelForCausalLM"]}))
    assert inspect_model(tmp_path, engines="vllm").engines[0].verdict == "unknown"
    assert inspect_model(tmp_path, engines="vllm", tp=4).engines[0].verdict == "refused"


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "gpt_oss", "qwen3_next", "deepseek_v3"]
)
def test_a_step_of_one_sequence_reads_the_experts_of_one_token(model_type: str, tmp_path: Path) -> None:
    source = tiny_models.save(model_type, tmp_path / "model", torch.bfloat16)
    model, _ = tiny_models.build(model_type)
    stacks = [
        p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name or "moe.experts." in name
    ]
    assert stacks
    headers = inspect_model(source, card="h100").serving
    for path in source.glob("*.safetensors*"):
        path.unlink()
    for found in (headers, inspect_model(source, card="h100").serving):  # from the config alone as well
        assert found and found.weight_bytes and found.cache_bytes and found.seconds_for_one
        read = found.weight_bytes - sum(stacks)  # two bytes each, and half of them
        assert found.seconds_for_one == pytest.approx((read + found.cache_bytes) / 3.35e12)


@pytest.mark.parametrize("context", ["abc", 0, -1, True, 1.5])
def test_a_context_is_a_whole_number(context: Any) -> None:
    with pytest.raises(SettingError, match=r"`context` is .* not a whole number of at least 1"):
        inspect_model(EMBEDDED_MODEL, context=context)


def test_a_context_is_a_number_or_its_short_form() -> None:
    short, number, other = (
        inspect_model(EMBEDDED_MODEL, context=tokens).to_dict() for tokens in ("8K", 8192, 8000)
    )
    assert short == number != other


@pytest.mark.parametrize(("name", "states"), [("lfm2", True), ("llama", False), ("t5gemma", False)])
def test_a_forecast_of_a_context_counts_states_and_takes_any_rotation(
    name: str, states: bool, tmp_path: Path
) -> None:
    found = inspect_model(tiny_models.save(name, tmp_path / name), tp=1, context=64)
    assert found.serving and found.serving.cache_bytes is not None
    assert found.serving.cache_bytes_per_token is not None
    assert (found.serving.cache_bytes > 64 * found.serving.cache_bytes_per_token) == states
