"""The plan of a conversion, before any tensor is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.convert.plan import Plan, grouped_outputs, make_plan
from headwise.io.reader import open_checkpoint
from headwise.models import architecture
from headwise.models.stock_match import match_source


def llama_config(**options: Any) -> LlamaConfig:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8, vocab_size=40)
    return LlamaConfig(**sizes | {"dtype": torch.bfloat16} | options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(llama_config()).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    return folder


def plan_for(model: Path, groups: int, **options: Any) -> Plan:
    checkpoint = match_source(open_checkpoint(model))
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


@pytest.mark.parametrize("groups", [4, 1])
def test_the_plan_has_the_tensors_of_the_stock_class(model: Path, groups: int) -> None:
    plan = plan_for(model, groups)
    stock = LlamaForCausalLM(LlamaConfig(**plan.config)).state_dict()
    assert {t.name: t.shape for t in plan.outputs} == {name: tuple(t.shape) for name, t in stock.items()}
    actions = {action.name: action.action for action in plan.actions}
    assert {n for n, action in actions.items() if action == "convert"} == {n for n in stock if "self_attn" in n}
    assert plan.bytes_before - plan.bytes_after == 3 * 2 * 32 * 4 * (8 - groups) * 2
    assert plan.parameters_after == sum(t.numel() for t in stock.values())
    assert plan.cache_before.bytes_per_token * groups == plan.cache_after.bytes_per_token * 8
    assert plan.disk == sum(shard.nbytes for shard in plan.shards) > plan.bytes_after
    assert f"GQA, {groups} KV heads" in str(plan).replace("MQA", "GQA, 1 KV heads") and "Weights: " in str(plan)
    plain = json.loads(json.dumps(plan.to_dict()))
    assert plain["layers"][2]["after"]["num_key_value_heads"] == groups
    assert sum(math.prod(t["after"]["shape"]) for t in plain["tensors"]) == plan.parameters_after


def test_the_plan_has_the_cache_on_each_gpu(model: Path) -> None:
    plan = plan_for(model, 4)
    assert plan.cache_before.bytes_per_token == 384
    assert plan.to_dict()["gpu_caches"] == [
        {"tp": tp, "before": 384 / tp, "after": max(192 / tp, 48)} for tp in (2, 4, 8)
    ]
    assert any(note.startswith("From tensor parallel 8 on, 4 KV heads save no cache") for note in plan.notes)
    assert not [note for note in plan_for(model, 8).notes if "tensor parallel" in note]


def test_only_computed_tensors_are_converted(model: Path) -> None:
    keys = {f"model.layers.{n}.self_attn.k_proj.weight" for n in range(3)}
    plan = plan_for(model, 8, computed=keys)
    assert {action.name for action in plan.actions if action.action == "convert"} == keys


def test_another_dtype_converts_every_tensor(model: Path) -> None:
    plan = plan_for(model, 8, dtype=torch.float32)
    assert {action.action for action in plan.actions} == {"convert"}
    assert plan.bytes_after == 2 * plan.bytes_before


def test_unused_buffers_are_dropped(model: Path, tmp_path: Path) -> None:
    tensors = {}
    for shard in model.glob("*.safetensors"):
        tensors |= load_file(shard)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {buffer: torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    plan = plan_for(tmp_path, 4)
    assert {action.name for action in plan.actions if action.action == "drop"} == {buffer}
    assert buffer not in {tensor.name for tensor in plan.outputs}
