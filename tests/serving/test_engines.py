"""The rules about engines: each one applies where it should, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from headwise.serving import engines

GOOD: dict[str, Any] = dict(
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    q_lora_rank=None,
    num_hidden_layers=27,
    attention_bias=False,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    rope_interleave=True,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)


def verdicts(**changes: Any) -> dict[str, engines.EngineVerdict]:
    return {verdict.name: verdict for verdict in engines.engine_verdicts({**GOOD, **changes})}


def test_deepseeks_own_shape_loads_everywhere() -> None:
    assert {verdict.loads for verdict in verdicts().values()} == {"yes"}


@pytest.mark.parametrize(
    ("changes", "engine", "loads", "word"),
    [
        (dict(kv_lora_rank=448), "vLLM", "yes", ""),
        (dict(kv_lora_rank=300), "vLLM", "no", "320"),
        (dict(kv_lora_rank=300), "vLLM, transformers backend", "unread", "320"),
        (dict(kv_lora_rank=300), "SGLang", "unread", "576"),
        (dict(kv_lora_rank=300), "llama.cpp", "yes", ""),
        (dict(attention_bias=True), "transformers", "yes", ""),
        (dict(attention_bias=True), "vLLM", "no", "bias"),
        (dict(attention_bias=True), "SGLang", "wrong", "bias"),
        (dict(attention_bias=True), "llama.cpp", "no", "bias"),
        (dict(rope_parameters=dict(rope_type="longrope")), "vLLM", "wrong", "rope type"),
        (dict(rope_parameters=dict(rope_type="longrope")), "llama.cpp", "wrong", "frequency"),
        (dict(rope_parameters=dict(rope_type="longrope")), "SGLang", "unread", "rope scaling"),
        (dict(rope_interleave=False), "vLLM", "wrong", "interleaved"),
        (dict(tie_word_embeddings=True), "vLLM", "no", "lm_head"),
        (dict(rms_norm_eps=1e-5), "vLLM", "wrong", "1e-6"),
        (dict(rms_norm_eps=1e-5), "SGLang", "wrong", "1e-6"),
        (dict(rms_norm_eps=1e-5), "llama.cpp", "wrong", "1e-6"),
        (dict(hidden_act="gelu"), "vLLM", "no", "silu"),
        (dict(hidden_act="gelu"), "llama.cpp", "wrong", "silu"),
        (dict(num_hidden_layers=32), "llama.cpp", "no", "q_lora_rank"),
        (dict(num_hidden_layers=32, q_lora_rank=1024), "llama.cpp", "yes", ""),
        (dict(rms_norm_eps=1e-5, attention_bias=True), "vLLM", "no", "1e-6"),
    ],
)
def test_rules(changes: dict[str, Any], engine: str, loads: str, word: str) -> None:
    verdict = verdicts(**changes)[engine]
    assert verdict.loads == loads
    assert word in verdict.reason


def test_every_rule_is_well_formed() -> None:
    facts = engines.engine_facts(GOOD)
    for engine in engines._table()["engines"]:
        assert engine["read"]
        for rule in engine["rules"]:
            assert set(rule) == {"fact", "allowed", "otherwise", "reason"}
            assert rule["fact"] in facts and rule["otherwise"] in engines.SEVERITY


@pytest.mark.parametrize(
    ("size", "row"), [(300, 320), (512, 512), (550, 576), (640, 576), (64, 64), (129, 128), (1025, 1024)]
)
def test_nearest_cache_row(size: int, row: int) -> None:
    assert engines.nearest_cache_row(size) == row


def test_splits_fill_the_cache_row() -> None:
    pairs = engines.rank_splits(160, 32, 8)
    assert (128, 32) in pairs and (96, 64) in pairs
    assert all(rank + rope == 160 and rope % 2 == 0 and rank > 0 for rank, rope in pairs)
    assert all(rope <= 8 for _, rope in engines.rank_splits(64, 8, 1))


def test_a_class_with_a_window_has_a_verdict_for_every_engine() -> None:
    loads = {
        name: {verdict.name: verdict.loads for verdict in engines.window_verdicts(name)}
        for name in ("MistralForCausalLM", "MinistralForCausalLM", "LlamaForCausalLM")
    }
    assert loads["MistralForCausalLM"]["llama.cpp"] == "wrong"
    assert loads["MinistralForCausalLM"] == dict(transformers="yes", vLLM="no", SGLang="no", **{"llama.cpp": "no"})
    assert loads["LlamaForCausalLM"] == {}
