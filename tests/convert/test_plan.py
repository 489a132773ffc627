"""What a model is said to be, and what a conversion is said to do, before any tensor is read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig

from headwise.convert.inspect import inspect_model
from headwise.convert.plan import grouped_outputs, make_plan
from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.models import architecture
from headwise.models.layout import AttentionLayout, CacheSize

SHARED = Path(__file__).parents[3] / "shared" / "configs"


def llama(**options) -> LlamaConfig:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8, vocab_size=40)
    return LlamaConfig(**sizes | {"dtype": torch.bfloat16} | options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(llama()).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    return folder


def plan_for(model: Path, groups: int, **options):
    checkpoint = open_checkpoint(model)
    arch = architecture.find_architecture(checkpoint.config, checkpoint.tensors)
    config = arch.with_groups(checkpoint.config, groups)
    outputs = grouped_outputs(checkpoint, arch, config, **options)
    return make_plan(
        checkpoint,
        arch,
        outputs,
        config=config,
        layouts=arch.layouts(config),
        arguments={"to": "gqa", "groups": groups},
        peak_memory=10**9,
    )


def test_inspect_says_what_the_stock_class_has(model):
    found = inspect_model(model)
    stock = LlamaForCausalLM.from_pretrained(model)
    assert (found.parameters, found.parameters_from) == (sum(p.numel() for p in stock.parameters()), "headers")
    assert found.dtype == torch.bfloat16 and [x.kind for x in found.layouts] == ["mha"] * 3
    past = stock(torch.arange(10)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert found.cache.bytes_per_token * 10 == held
    assert found.cache.at[8192] == found.cache.bytes_per_token * 8192


def test_options_and_what_they_save(model):
    found = inspect_model(model)
    heads = {(o.to, o.num_key_value_heads): o.saved for o in found.options if o.num_key_value_heads}
    assert heads == {("mqa", 1): 7 / 8, ("gqa", 2): 3 / 4, ("gqa", 4): 1 / 2}
    assert found.mla is None and not [o for o in found.options if o.to == "mla"], "64 numbers are below any latent"


def test_mla_is_offered_where_it_saves(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama(hidden_size=4096, num_attention_heads=32).to_dict()))
    found = inspect_model(tmp_path)
    latents = {o.kv_lora_rank: o.cache.bytes_per_token for o in found.options if o.to == "mla"}
    assert latents == {rank: 3 * (rank + 64) * 2 for rank in (256, 448, 512)}


def test_why_not_mla(tmp_path):
    config = PhiConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=32)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    found = inspect_model(tmp_path)
    assert "cannot become MLA" in (found.mla or "") and "mla" not in {o.to for o in found.options}


def test_a_window_bounds_the_cache():
    full = AttentionLayout(8, 2, 16, 16, 16)
    window = AttentionLayout(8, 2, 16, 16, 16, sliding_window=4096)
    cache = CacheSize.of([full, window], torch.float16)
    assert cache.bytes_per_token == 2 * 64 * 2
    assert cache.at == {n: 64 * 2 * (n + 4096) for n in (8192, 32768, 131072)}


@pytest.mark.parametrize(
    ("metadata", "parameters"),
    [({"total_size": 1000}, 500), ({"total_size": 1000, "total_parameters": 499}, 499), ({}, None), ("x", None)],
)
def test_inspect_with_an_index_and_no_weights(tmp_path, metadata, parameters):
    (tmp_path / "config.json").write_text(json.dumps(llama().to_dict()))
    index = {"metadata": metadata, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = inspect_model(tmp_path)
    assert (found.parameters, found.parameters_from) == (parameters, "index" if parameters else None)


def test_inspect_of_a_bare_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama().to_dict()))
    found = inspect_model(tmp_path, context=4096)
    assert found.parameters is None and found.rope_ranges[0].context == 4096
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["kind"] == "mha"


def test_inspect_looks_at_the_headers(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(HeadwiseError, match="truncated"):
        inspect_model(tmp_path)


@pytest.mark.parametrize("groups", [4, 1])
def test_plan_says_what_the_stock_class_would_hold(model, groups):
    plan = plan_for(model, groups)
    stock = LlamaForCausalLM(LlamaConfig(**plan.config)).state_dict()
    assert {t.name: t.shape for t in plan.outputs} == {name: tuple(t.shape) for name, t in stock.items()}
    actions = {action.name: action.action for action in plan.actions}
    assert {n for n, action in actions.items() if action == "convert"} == {n for n in stock if "self_attn" in n}
    assert plan.bytes_before - plan.bytes_after == 3 * 2 * 32 * 4 * (8 - groups) * 2
    assert plan.parameters_after == sum(t.numel() for t in stock.values())
    assert plan.cache_before.bytes_per_token * groups == plan.cache_after.bytes_per_token * 8
    assert plan.disk == sum(shard.nbytes for shard in plan.shards) > plan.bytes_after
    shown = json.loads(json.dumps(plan.to_dict()))
    assert shown["layers"][2]["after"]["num_key_value_heads"] == groups
    assert sum(math.prod(t["after"]["shape"]) for t in shown["tensors"]) == plan.parameters_after


def test_only_what_is_computed_is_rewritten(model):
    keys = {f"model.layers.{n}.self_attn.k_proj.weight" for n in range(3)}
    plan = plan_for(model, 8, computed=keys)
    assert {action.name for action in plan.actions if action.action == "convert"} == keys


def test_another_dtype_rewrites_everything(model):
    plan = plan_for(model, 8, dtype=torch.float32)
    assert {action.action for action in plan.actions} == {"convert"}
    assert plan.bytes_after == 2 * plan.bytes_before


def test_buffers_that_nobody_reads_are_dropped(model, tmp_path):
    tensors = {}
    for shard in model.glob("*.safetensors"):
        tensors |= load_file(shard)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {buffer: torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    plan = plan_for(tmp_path, 4)
    assert {action.name for action in plan.actions if action.action == "drop"} == {buffer}
    assert buffer not in {tensor.name for tensor in plan.outputs}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared configs are not here")
@pytest.mark.parametrize("folder", sorted(SHARED.glob("*/")), ids=lambda path: path.name)
def test_every_shared_config_is_inspected_or_refused_with_a_reason(folder):
    try:
        found = inspect_model(folder)
    except HeadwiseError as error:
        assert "\n" not in str(error)
        return
    assert found.cache.bytes_per_token > 0 and json.dumps(found.to_dict())
