"""The rules about engines: each one applies where it should, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from headwise.errors import SettingError
from headwise.serving import engine_facts, engines

GOOD: dict[str, Any] = dict(
    architectures=["DeepseekV3ForCausalLM"],
    vocab_size=102400,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    q_lora_rank=None,
    num_hidden_layers=27,
    first_k_dense_replace=27,  # what marks a config of headwise
    n_routed_experts=2,
    n_group=1,
    attention_bias=False,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    rope_interleave=True,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
SPARSE = dict(
    architectures=["DeepseekV32ForCausalLM"],
    q_lora_rank=1024,
    index_topk=2048,
    index_n_heads=32,
    index_head_dim=128,
)
SHARED = SPARSE | dict(architectures=["GlmMoeDsaForCausalLM"])
LONGROPE = dict(rope_parameters=dict(rope_type="longrope"))
YARN = dict(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0, beta_fast=32)


SMOLLM2 = "bpe of SmolLM2"


def verdicts(*, window: bool = False, tokenizer: str = SMOLLM2, **changes: Any) -> dict[str, engines.EngineVerdict]:
    dense = {"first_k_dense_replace": changes.get("num_hidden_layers", GOOD["num_hidden_layers"])}
    found = engines.engine_verdicts({**GOOD, **dense, **changes}, window=window, tokenizer=tokenizer)
    return {verdict.name: verdict for verdict in found}


def grouped(name: str, *, window: bool = False, tokenizer: str = "sentencepiece", **rope: Any) -> dict[str, str]:
    config = {"architectures": [name], "rope_parameters": rope}
    return {v.name: v.verdict for v in engines.engine_verdicts(config, window=window, tokenizer=tokenizer)}


def test_only_the_linear_norm_of_headwise_needs_options_of_the_quantizer() -> None:
    """Rows before a norm of DeepSeek's own have an ordinary size."""
    own = verdicts(num_hidden_layers=30, first_k_dense_replace=1, q_lora_rank=512)["llama.cpp"]
    assert own.verdict == "command" and own.evidence == "read"
    assert not any("--tensor-type" in command for command in own.commands) and "--no-repack" in own.commands[2]
    ours = verdicts(num_hidden_layers=30, q_lora_rank=512)["llama.cpp"]
    assert "attn_q_a=bf16" in ours.commands[1] and "near 1e-7" in ours.reason
    for engine, stored in (("llama.cpp", True), ("vllm", False)):
        assert engines.stores_powers(GOOD, [engine]) is stored
        assert not engines.stores_powers({**GOOD, "first_k_dense_replace": 1}, [engine])


def test_deepseeks_own_shape_loads_everywhere() -> None:
    found = verdicts()
    assert tuple(found) == engines.ENGINES
    assert all(verdict.serves for verdict in found.values())
    assert found["vllm"].verdict == found["sglang"].verdict == "loads"
    assert found["vllm"].commands == ("vllm serve OUT",)


@pytest.mark.parametrize(
    ("changes", "engine", "verdict", "word"),
    [
        (dict(kv_lora_rank=448), "vllm", "loads", "on Hopper its FlashAttention backend takes this cache row"),
        (dict(kv_lora_rank=300), "vllm", "command", "alone refuses cache rows other than 320, 512 and 576"),
        (dict(kv_lora_rank=1024), "vllm", "command", "alone refuses cache rows"),
        (dict(kv_lora_rank=1032), "vllm", "unknown", "ranks above 1024"),
        (dict(kv_lora_rank=300), "sglang", "command", "Triton"),
        (dict(kv_lora_rank=448), "sglang", "loads", "fa3, takes this shape; on Blackwell add"),
        (dict(v_head_dim=256, qk_nope_head_dim=192), "sglang", "loads", "fa3, takes this shape"),
        (dict(kv_lora_rank=192), "sglang", "command", "fa3, does not take"),
        (dict(v_head_dim=64), "sglang", "command", "fa3"),
        (dict(kv_lora_rank=17), "llama.cpp", "command", "bfloat16"),
        (dict(v_head_dim=64, qk_nope_head_dim=64), "vllm", "command", "no MLA prefill for these head dims"),
        (dict(v_head_dim=64, qk_nope_head_dim=68), "vllm", "no", "multiple of 8 up to 256"),
        (dict(v_head_dim=200), "vllm", "no", "values no wider"),
        (dict(qk_nope_head_dim=256), "vllm", "no", "multiple of 8 up to 256"),
        (
            dict(kv_lora_rank=528, qk_rope_head_dim=48),
            "vllm",
            "command",
            "a rank from 256 to 512 and a rotary key up",
        ),
        (dict(v_head_dim=128, qk_nope_head_dim=64), "vllm", "loads", ""),
        (dict(attention_bias=True), "transformers", "loads", ""),
        (dict(attention_bias=True), "vllm", "wrong", "drops the biases"),
        (dict(attention_bias=True), "sglang", "wrong", "drops the biases"),
        (dict(attention_bias=True), "llama.cpp", "no", "biases"),
        (LONGROPE, "vllm", "wrong", "rope type"),
        (LONGROPE, "llama.cpp", "wrong", "longrope"),
        (LONGROPE, "sglang", "wrong", "rope type"),
        (dict(rope_interleave=False), "vllm", "wrong", "interleaved"),
        (dict(tie_word_embeddings=True), "vllm", "no", "lm_head"),
        (dict(rms_norm_eps=1e-5), "vllm", "wrong", "1e-6"),
        (dict(rms_norm_eps=1e-5), "sglang", "wrong", "1e-6"),
        (dict(rms_norm_eps=1e-5), "llama.cpp", "wrong", "1e-6"),
        (dict(hidden_act="gelu"), "vllm", "no", "silu"),
        (dict(hidden_act="gelu"), "sglang", "no", "silu"),
        (dict(hidden_act="gelu"), "llama.cpp", "wrong", "silu"),
        (dict(n_routed_experts=1), "llama.cpp", "no", "n_group"),
        (dict(num_hidden_layers=32), "llama.cpp", "command", "takes 0"),
        (dict(num_hidden_layers=48), "llama.cpp", "command", "takes 0"),
        (dict(num_hidden_layers=32, q_lora_rank=1024), "llama.cpp", "command", "first query factor"),
        (dict(num_hidden_layers=26, q_lora_rank=1024), "llama.cpp", "no", "q_proj only"),
        (dict(num_hidden_layers=48, vocab_size=128256, q_lora_rank=9), "llama.cpp", "no", "q_proj only"),
        (dict(tokenizer="sentencepiece"), "llama.cpp", "no", "BPE"),
        (dict(tokenizer="unreadable"), "llama.cpp", "unknown", "tokenizer.json"),
        (dict(rms_norm_eps=1e-5, tie_word_embeddings=True), "vllm", "no", "lm_head"),
        (SPARSE, "transformers", "loads", ""),
        (SPARSE, "vllm", "loads", ""),
        (SPARSE, "sglang", "loads", ""),
        (SPARSE, "llama.cpp", "command", "add_bos_token"),
        (SPARSE | dict(index_head_dim=288), "llama.cpp", "no", "Hadamard"),
        (SPARSE | dict(tokenizer="sentencepiece"), "llama.cpp", "no", "BPE"),
        (SHARED, "transformers", "loads", ""),
        (SHARED, "vllm", "loads", ""),
        (SHARED, "sglang", "loads", ""),
        (SHARED | dict(index_head_dim=64), "sglang", "no", "128 elements"),
        (SHARED | dict(kv_lora_rank=448), "sglang", "unknown", "except 576"),
        (SHARED, "llama.cpp", "no", "GLM's special tokens"),
        (SHARED | dict(index_head_dim=64), "vllm", "no", "128 elements"),
        (SPARSE | dict(index_head_dim=64), "vllm", "no", "128 elements"),
        (SPARSE | dict(index_head_dim=64), "sglang", "no", "128 elements"),
        (SPARSE | dict(kv_lora_rank=448), "vllm", "unknown", "rows of 576"),
        (SPARSE | dict(kv_lora_rank=448), "sglang", "unknown", "except 576"),
        (SPARSE | dict(v_head_dim=64, qk_nope_head_dim=32), "vllm", "loads", ""),
        (dict(architectures=["OtherForCausalLM"]), "sglang", "unknown", "OtherForCausalLM"),
        (dict(rope_interleave=False), "llama.cpp", "wrong", "interleaved"),
        (dict(rope_parameters=dict(rope_type="linear")), "llama.cpp", "unknown", "not compared"),
        (SPARSE | dict(index_head_dim=64), "llama.cpp", "command", "add_bos_token"),
    ],
)
def test_rules_of_mla(changes: dict[str, Any], engine: str, verdict: str, word: str) -> None:
    found = verdicts(**changes)[engine]
    assert found.verdict == verdict
    assert word in found.reason
    assert bool(found.commands) == (found.serves and engine != "transformers")


@pytest.mark.parametrize("width, evidence", [(64, "run"), (128, "read"), (512, "read"), (96, "read")])
def test_a_width_of_index_keys_that_was_not_run_is_read(width: int, evidence: str) -> None:
    verdict = verdicts(**SPARSE | dict(index_head_dim=width))["llama.cpp"]
    assert verdict.evidence.startswith(evidence)


def test_the_commands_of_llama_cpp_keep_what_quantizing_destroys() -> None:
    direct = verdicts(num_hidden_layers=30)["llama.cpp"].commands
    factored = verdicts(num_hidden_layers=30, q_lora_rank=576)["llama.cpp"].commands
    key = "--override-kv deepseek2.attention.q_lora_rank=int:0"
    assert all("--outtype bf16" in commands[0] for commands in (direct, factored))
    assert all("--tensor-type attn_kv_a_mqa=bf16" in commands[1] for commands in (direct, factored))
    assert key in direct[1] and key in direct[2]
    assert "--tensor-type attn_q_a=bf16" in factored[1] and not any(key in command for command in factored)


def test_rules_of_grouped_models() -> None:
    assert set(grouped("LlamaForCausalLM").values()) == {"loads"}
    assert grouped("LlamaForCausalLM", tokenizer="bpe")["llama.cpp"] == "command"
    assert grouped("LlamaForCausalLM", tokenizer=SMOLLM2)["llama.cpp"] == "loads"
    assert grouped("LlamaForCausalLM", tokenizer="bpe of the embedded model")["llama.cpp"] == "no"
    windowed = grouped("MistralForCausalLM", window=True)
    assert windowed == {"transformers": "loads", "vllm": "loads", "sglang": "wrong", "llama.cpp": "wrong"}
    assert grouped("MistralForCausalLM") == dict.fromkeys(engines.ENGINES, "loads")
    refused = grouped("MinistralForCausalLM", window=True)
    assert refused == {"transformers": "loads", "vllm": "no", "sglang": "no", "llama.cpp": "no"}
    assert grouped("Gemma2ForCausalLM", window=True)["llama.cpp"] == "unknown"
    assert set(grouped("NovelForCausalLM").values()) == {"loads", "unknown"}


@pytest.mark.parametrize(
    ("rope", "verdict"),
    [
        (dict(rope_type="yarn", factor=4.0), "loads"),
        (dict(rope_type="yarn", factor=4.0, attention_factor=1.138629436111989), "loads"),
        (dict(rope_type="yarn", factor=4.0, attention_factor=1.0), "unknown"),
        (dict(rope_type="llama3", factor=8.0), "loads"),
        (dict(rope_type="dynamic", factor=2.0), "wrong"),
        (dict(rope_type="longrope"), "wrong"),
        (dict(full_attention=dict(rope_type="default")), "unknown"),
    ],
)
def test_rope_rules_of_llama_cpp(rope: dict[str, Any], verdict: str) -> None:
    assert grouped("LlamaForCausalLM", **rope)["llama.cpp"] == verdict


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("config", [GOOD, {"architectures": ["LlamaForCausalLM"]}])
def test_other_weights_than_plain_ones_were_not_read(engine: str, config: dict[str, Any]) -> None:
    for method, words in (("awq", "weights in awq"), ("gguf", "gguf" if engine != "llama.cpp" else "its format")):
        stored = config | {"quantization_config": {"quant_method": method}}
        found = engines.engine_verdicts(stored, tokenizer=SMOLLM2, engines=[engine])[0]
        assert found.verdict == "unknown" and words in found.reason


def test_windows_and_rotations_that_were_not_read() -> None:
    windowed = grouped("Gemma2ForCausalLM", window=True)
    assert windowed["vllm"] == windowed["llama.cpp"] == "unknown"
    assert grouped("Phi3ForCausalLM", window=True)["sglang"] == "unknown"
    for kind in ("dynamic", "longrope"):
        assert grouped("LlamaForCausalLM", rope_type=kind)["vllm"] == "unknown"
    assert grouped("LlamaForCausalLM", rope_type="llama3")["sglang"] == "unknown"
    assert grouped("Qwen2ForCausalLM", rope_type="llama3")["llama.cpp"] == "wrong"


def test_every_rule_is_well_formed() -> None:
    facts = engine_facts.engine_facts(GOOD)
    assert tuple(engines._table()) == engines.ENGINES
    for engine in engines._table().values():
        assert all(row.keys() - {"run"} == {"names", "evidence", "versions"} for row in engine["classes"])
        for kind in ("mla", "grouped"):
            for rule in engine.get(kind, ()):
                assert {"verdict", "evidence", "versions", "reason"} <= set(rule)
                optional = {"if", "unless", "flags", "before", "remedy", "run"}
                assert set(rule) <= {"verdict", "evidence", "versions", "reason"} | optional
                for case in rule.get("run", {}).get("where", ()):
                    assert case.keys() <= facts.keys()
                assert rule["verdict"] in engines.SEVERITY and rule["evidence"] in ("run", "read")
                conditions = rule.get("if", {}).keys() | rule.get("unless", {}).keys()
                assert conditions <= facts.keys()
                assert set(rule.get("flags", ())) <= {"serve", "quantize"}


def test_an_engine_that_the_user_names_must_serve_the_result() -> None:
    found = tuple(verdicts(attention_bias=True).values())
    engines.require_engines(found, ["transformers"])
    for name, words in (("vllm", "computes another function"), ("llama.cpp", "does not load")):
        with pytest.raises(SettingError, match=words) as caught:
            engines.require_engines(found, [name])
        assert caught.value.field == "engines"


def test_a_cache_type_that_an_engine_has_not() -> None:
    engines.require_cache_dtype(["vllm", "sglang"], "fp8")
    with pytest.raises(SettingError, match=r"llama\.cpp has no FP8 cache"):
        engines.require_cache_dtype(["vllm", "llama.cpp"], "fp8")


@pytest.mark.parametrize(
    ("size", "row"), [(300, 320), (512, 512), (550, 576), (640, 576), (64, 64), (129, 128), (1025, 1024)]
)
def test_nearest_cache_row(size: int, row: int) -> None:
    assert engines.nearest_cache_row(size) == row


def test_cache_rows_of_the_engines_that_the_user_names() -> None:
    assert engines.nearest_cache_row(300, ["llama.cpp"]) == 300
    assert engines.nearest_cache_row(300, ["vllm", "llama.cpp"]) == 320
    assert engines.nearest_cache_row(500, ["vllm", "sglang"]) == 576


@pytest.mark.parametrize(
    ("changes", "engine", "hint"),
    [
        (dict(qk_nope_head_dim=68), "vllm", "Give a `rope_dim` with which nope + rope is a multiple of 8"),
        (dict(qk_nope_head_dim=512), "vllm", "Leave out vllm."),
        (LONGROPE, "vllm", "Leave out what keeps the source's frequencies (`exact`"),
        (LONGROPE, "sglang", "Leave out what keeps the source's frequencies (`exact`"),
        (LONGROPE, "llama.cpp", "Leave out what keeps the source's frequencies (`exact`"),
        (dict(attention_bias=True), "llama.cpp", "Leave out llama.cpp."),
    ],
)
def test_a_refused_result_comes_with_a_hint_that_fits(changes: dict[str, Any], engine: str, hint: str) -> None:
    engines.require_engines(verdicts().values(), [engine])
    with pytest.raises(SettingError) as caught:
        engines.require_engines(verdicts(**changes).values(), [engine])
    assert str(caught.value.hint).startswith(hint)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "MinistralForCausalLM"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_a_window_that_an_engine_does_not_serve_may_be_left_out(name: str, engine: str) -> None:
    config = {"architectures": [name], "rope_parameters": {}}
    found = engines.engine_verdicts(config, window=True, engines=[engine])
    if found[0].serves:
        assert (name, engine) == ("MistralForCausalLM", "vllm")
        return
    with pytest.raises(SettingError) as caught:
        engines.require_engines(found, [engine])
    assert str(caught.value.hint).startswith("Leave out `sliding_window`")


def test_a_wrong_result_is_named_beside_an_error() -> None:
    both = verdicts(qk_nope_head_dim=68, attention_bias=True)["vllm"]
    assert both.verdict == "no" and "drops the biases" in both.reason and "multiple of 8" in both.reason


RAN = dict(kv_lora_rank=144, qk_rope_head_dim=48, qk_nope_head_dim=64, v_head_dim=64)
RAN_TOO = dict(kv_lora_rank=192, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32)
TRITON = "vllm serve OUT --attention-backend TRITON_MLA"


def test_a_vocabulary_that_was_not_run_is_checked_first() -> None:
    latent = verdicts(tokenizer="bpe")["llama.cpp"]
    heads = engines.engine_verdicts(
        {"architectures": ["LlamaForCausalLM"]}, tokenizer="bpe", engines=["llama.cpp"]
    )[0]
    for verdict in (latent, heads):
        assert verdict.commands[0] == "python convert_hf_to_gguf.py OUT --vocab-only --outfile OUT-vocabulary.gguf"
        assert (
            len(verdict.commands) == 4 and "read" in verdict.evidence and "first command checks" in verdict.reason
        )
    assert heads.evidence == "read"
    assert verdicts(tokenizer="bpe of the embedded model")["llama.cpp"].verdict == "no"


def test_a_config_without_a_class() -> None:
    for config in (GOOD, {}):
        for names in (None, []):
            found = engines.engine_verdicts({**config, "architectures": names}, tokenizer=SMOLLM2)
            assert [verdict.verdict for verdict in found] == ["loads", "wrong", "no", "no"]
            assert all("names no class" in verdict.reason for verdict in found[1:])


def on(gpu: str, dtype: str = "bf16", divided: bool = False, **changes: Any) -> dict[str, engines.EngineVerdict]:
    deployment = engine_facts.Deployment(gpu, dtype, divided)
    found = engines.engine_verdicts({**GOOD, **changes}, tokenizer=SMOLLM2, deployment=deployment)
    return {verdict.name: verdict for verdict in found}


@pytest.mark.parametrize(
    ("changes", "gpu", "dtype", "evidence"),
    [
        (RAN, "unknown", "bf16", "run"),
        (RAN, "hopper", "fp8", "run"),
        (RAN, "other", "bf16", "read"),
        (RAN_TOO, "hopper", "bf16", "run"),
        (RAN_TOO, "hopper", "fp8", "read"),
        (dict(kv_lora_rank=128), "hopper", "bf16", "read"),
    ],
)
def test_the_plugin_for_vllm_serves_other_shapes(
    changes: dict[str, Any], gpu: str, dtype: str, evidence: str
) -> None:
    verdict = on(gpu, dtype, **changes)["vllm"]
    assert verdict.serves and verdict.commands == ("pip install path/to/headwise", "vllm serve OUT")
    assert verdict.evidence == evidence and "with headwise installed beside it" in verdict.reason
    engines.require_engines([verdict], ["vllm"])
    served = engines.with_options(verdict, {"tp": 2, "context": 64})
    assert served.commands == (
        "pip install path/to/headwise",
        "vllm serve OUT --tensor-parallel-size 2 --max-model-len 64",
    )
    assert on("amd", dtype, **changes)["vllm"].verdict == "unknown"


def test_the_plugin_for_vllm_is_for_gpus_of_nvidia() -> None:
    for changes in (dict(qk_nope_head_dim=96), dict(kv_lora_rank=128)):
        assert on("amd", **changes)["vllm"].verdict == "unknown" and on("other", **changes)["vllm"].serves
    assert on("amd")["vllm"].serves


@pytest.mark.parametrize("rank", [256, 448])
def test_rows_of_320_and_512_need_a_flag_on_some_cards(rank: int) -> None:
    for gpu, dtype, command in (
        ("unknown", "bf16", "vllm serve OUT"),
        ("hopper", "bf16", "vllm serve OUT"),
        ("blackwell", "bf16", TRITON),
        ("other", "bf16", "vllm serve OUT"),
        ("amd", "bf16", "vllm serve OUT"),
        ("unknown", "fp8", TRITON),
        ("hopper", "fp8", TRITON),
        ("blackwell", "fp8", TRITON),
        ("other", "fp8", "vllm serve OUT"),
    ):
        verdict = on(gpu, dtype, kv_lora_rank=rank)["vllm"]
        assert verdict.commands == (command,) and ("Blackwell add" in verdict.reason) == (
            gpu + dtype == "unknownbf16"
        )
        assert verdict.evidence == ("run" if dtype == "bf16" and gpu in ("unknown", "hopper") else "read")


def test_a_row_of_576_may_have_a_rank_that_no_first_backend_takes() -> None:
    for gpu in ("unknown", "hopper", "blackwell"):
        assert on(gpu, kv_lora_rank=528, qk_rope_head_dim=48)["vllm"].commands[-1] == TRITON
    assert on("other", kv_lora_rank=528, qk_rope_head_dim=48)["vllm"].commands[-1] == "vllm serve OUT"


def test_nothing_was_run_with_a_cache_in_fp8_but_one_shape() -> None:
    for gpu in ("unknown", "hopper", "blackwell", "other", "amd"):
        assert on(gpu, "fp8")["vllm"].evidence == "read"
    assert [on(gpu)["vllm"].evidence for gpu in ("hopper", "blackwell", "other")] == ["run", "read", "read"]
    for name in ("LlamaForCausalLM", "MistralForCausalLM"):
        for dtype, evidence in (("bf16", "run"), ("fp8", "read")):
            found = engines.engine_verdicts(
                {"architectures": [name]}, engines=["vllm"], deployment=engine_facts.Deployment("hopper", dtype)
            )
            assert found[0].evidence == evidence


def test_sglang_needs_a_flag_where_its_default_does_not_take_a_shape() -> None:
    assert [on(gpu, **RAN_TOO)["sglang"].evidence for gpu in ("unknown", "hopper", "amd")] == ["run", "run", "read"]
    triton = ("python -m sglang.launch_server --model-path OUT --attention-backend triton",)
    plain = ("python -m sglang.launch_server --model-path OUT",)
    for changes, flagged in (
        (RAN, ("unknown", "hopper", "blackwell", "amd")),
        (dict(kv_lora_rank=448), ("blackwell", "amd")),
    ):
        for gpu in ("unknown", "hopper", "blackwell", "amd", "other"):
            assert on(gpu, **changes)["sglang"].commands == (triton if gpu in flagged else plain)
    assert on("blackwell")["sglang"].commands == plain, "DeepSeek-V3's own shape"


def test_a_divided_cache_in_sglang() -> None:
    assert on("hopper", divided=True)["sglang"].verdict == "unknown"
    divided = engine_facts.Deployment(context_parallel=True)
    for window, verdict in ((False, "command"), (True, "no")):
        config = {"architectures": ["LlamaForCausalLM"]}
        found = engines.engine_verdicts(config, engines=["sglang"], window=window, deployment=divided)[0]
        assert found.verdict == verdict and (window or found.commands[0].endswith("--attention-backend triton"))


def test_classes_and_rotations_of_vllm_0_33() -> None:
    assert grouped("Dots1ForCausalLM")["vllm"] == "no"
    assert grouped("SmolLM3ForCausalLM")["vllm"] == "loads"
    assert grouped("LlamaForCausalLM", rope_type="yarn", factor=4.0, attention_factor=1.0)["vllm"] == "loads"


def test_heads_that_engines_have_kernels_for() -> None:
    assert engines.heads_fit(128, 128) and engines.heads_fit(64, 128)
    assert not engines.heads_fit(64, 64) and not engines.heads_fit(80, 128)


@pytest.mark.parametrize(
    ("dims", "padded"),
    [((80, 64, 80), (128, 128)), ((64, 64, 64), (64, 128)), ((160, 64, 130), (192, 256)), ((300, 64, 9), (300, 9))],
)
def test_heads_are_padded_for_vllm_alone(dims: tuple[int, int, int], padded: tuple[int, int]) -> None:
    assert engines.padded_head_dims(*dims, ["llama.cpp", "vllm"], 320) == padded
    for names, row in ((["llama.cpp"], 320), ([], 320), (["vllm"], 300)):  # the plugin for vLLM pads by itself
        assert engines.padded_head_dims(*dims, names, row) == (dims[0], dims[2])
    assert engines.rope_dims(["vllm"]) == {64} and engines.rope_dims(["sglang"]) is engines.rope_dims([]) is None


def test_queries_have_two_factors_where_llama_cpp_needs_them() -> None:
    assert engines.needs_factored_queries(30, 49152, ["llama.cpp"])
    assert engines.needs_factored_queries(48, 49152, ["llama.cpp"])
    for layers, vocabulary in ((26, 9), (27, 9), (48, 128256)):
        assert not engines.needs_factored_queries(layers, vocabulary, ["llama.cpp"])
    assert not engines.needs_factored_queries(30, 9, ["vllm"]) and not engines.needs_factored_queries(30, 9, [])


def test_splits_fill_the_cache_row() -> None:
    dims = engines.rope_dims_to_try(160, 32, 8)
    assert {32, 64} <= set(dims) and all(dim % 2 == 0 and 0 < dim < 160 for dim in dims)
    assert all(dim <= 8 for dim in engines.rope_dims_to_try(64, 8, 1))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("rope", "verdict"),
    [
        (dict(rope_scaling=YARN | dict(type="yarn")), "loads"),
        (dict(rope_scaling=YARN | dict(rope_type="yarn")), "loads"),
        (dict(rope_parameters=YARN | dict(rope_type="yarn", rope_theta=1e4, attention_factor=None)), "loads"),
        (dict(rope_parameters=YARN | dict(rope_type="yarn", attention_factor=1.0)), "wrong"),
        (dict(rope_parameters=YARN | dict(rope_type="yarn", mscale=None)), "wrong"),
        (dict(rope_parameters=YARN | dict(rope_type="yarn", factor=None)), "wrong"),
        (dict(rope_parameters=YARN | dict(rope_type="linear")), "wrong"),
        (dict(rope_parameters=YARN | dict(rope_type="llama3")), "wrong"),
    ],
)
def test_only_deepseeks_yarn_is_read_as_deepseeks(engine: str, rope: dict[str, Any], verdict: str) -> None:
    config = {key: value for key, value in GOOD.items() if key != "rope_parameters"} | rope
    assert [found.verdict for found in engines.engine_verdicts(config, engines=[engine])] == [verdict]


def test_a_stray_field_makes_no_mla_and_odd_rope_fields_no_error() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "kv_lora_rank": 64}
    assert "cache_row" not in engine_facts.engine_facts(config)
    huge = {"rope_type": "yarn", "attention_factor": 10**400, "factor": 4}
    for odd in ("yarn", ["yarn"], {"rope_type": "yarn", "attention_factor": "1", "factor": None}, huge):
        assert engine_facts.engine_facts(config | {"rope_parameters": odd})["rope_attention_factor"] == "other"


@pytest.mark.parametrize("odd", [7, "x", {}, [], [7], [[]], True, None])
def test_odd_fields_give_verdicts(odd: object) -> None:
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    names = ("architectures", "n_routed_experts", "n_group", "num_hidden_layers", "vocab_size", "q_lora_rank")
    others = ("attention_bias", "rope_interleave", "rms_norm_eps", "hidden_act", "text_config")
    for name in (*names, *others):
        assert engines.engine_verdicts(sizes | {name: odd})
    for name in ("rope_type", "type", "factor", "attention_factor"):
        assert engines.engine_verdicts(sizes | {"rope_parameters": {name: odd}})
