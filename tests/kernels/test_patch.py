"""A stock model with the kernels gives the same logits as without them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    GlmMoeDsaConfig,
    LlamaConfig,
    MistralConfig,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.compat import cache_argument, cache_of
from headwise.errors import HeadwiseError
from headwise.kernels import disable, enable

COMMON = dict(
    vocab_size=128, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
    max_position_embeddings=256, pad_token_id=0,
)  # fmt: skip
LATENT = dict(
    num_key_value_heads=6, kv_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20,
    q_lora_rank=None, first_k_dense_replace=2,
)  # fmt: skip
CONFIGS = {
    "deepseek_v3": DeepseekV3Config(**COMMON, **LATENT),
    "deepseek_v3 half-split": DeepseekV3Config(**COMMON, **LATENT, rope_interleave=False),
    "deepseek_v2": DeepseekV2Config(**COMMON, **LATENT),
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "mistral with a window": MistralConfig(**COMMON, num_key_value_heads=1, sliding_window=12),
}


def model_of(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def prompts() -> dict[str, torch.Tensor]:
    """Two prompts of unequal length, padded on the left."""
    ids = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :7] = 0
    mask[0, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decoded(model, **options):
    return model.generate(
        **prompts(), max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_logits(name: str, cache: str) -> None:
    model = model_of(name)
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    before = decoded(model, **options)
    during = decoded(enable(model), **options)
    after = decoded(disable(model), **options)
    for old, new, restored in zip(before.logits, during.logits, after.logits, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(restored, old, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama", "mistral with a window"])
def test_several_new_tokens_at_once(name: str) -> None:
    """Speculative verification: the logits of five tokens equal those of one long forward pass."""
    model = enable(model_of(name))
    ids = prompts()["input_ids"][1:]
    with torch.no_grad():
        whole = disable(model)(ids).logits
        enable(model)
        cache = cache_of(model(ids[:, :15]))
        step = model(ids[:, 15:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(step, whole[:, 15:], rtol=1e-4, atol=1e-5)


def test_the_cache_is_never_expanded_in_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(model_of("deepseek_v3"))
    kind = type(model.model.layers[0].self_attn)
    ids = prompts()["input_ids"][1:]
    with torch.no_grad():
        cache = cache_of(model(ids[:, :19]))
        monkeypatch.setattr(kind, "expand_kv", lambda *_: pytest.fail("the latent cache was expanded"))
        model(ids[:, 19:], **cache_argument(model, cache))


def test_prefill_uses_the_attention_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def theirs(module, query, *arguments, **options):
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, *arguments, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "theirs", theirs)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "theirs", sdpa_mask)
    model = model_of("deepseek_v3")
    ids = prompts()["input_ids"][1:]
    with torch.no_grad():
        expected = model(ids).logits[:, 19:]
        model.set_attn_implementation("theirs")
        cache = cache_of(enable(model)(ids[:, :19]))
        assert calls == [19, 19]
        step = model(ids[:, 19:], **cache_argument(model, cache)).logits
        assert calls == [19, 19]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)
    assert disable(model).config._attn_implementation == "theirs"


@pytest.mark.parametrize("before", ["eager", "flash_attention_3"])
def test_sdpa_replaces_an_attention_that_cannot_be_used(before: str) -> None:
    model = model_of("llama")
    model.config._attn_implementation_internal = before
    ids = prompts()["input_ids"][1:]
    with torch.no_grad():
        torch.testing.assert_close(enable(model)(ids).logits, model_of("llama")(ids).logits)


def test_gradients_flow_through_short_continuations() -> None:
    model = enable(model_of("deepseek_v3"))
    ids = prompts()["input_ids"][1:]
    with torch.no_grad():
        cache = cache_of(model(ids[:, :15]))
    model(ids[:, 15:], **cache_argument(model, cache)).logits.sum().backward()
    assert model.model.layers[0].self_attn.kv_b_proj.weight.grad.abs().sum() > 0


def test_static_cache_and_torch_compile() -> None:
    model = model_of("deepseek_v3")
    ids = prompts()["input_ids"][1:]

    def last_logits(step) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(ids[:, :18], **cache_argument(model, cache))
            step(ids[:, 18:19], **cache_argument(model, cache))
            return step(ids[:, 19:], **cache_argument(model, cache)).logits

    expected = last_logits(model)
    enable(model)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(last_logits(whole), expected, rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_is_refused() -> None:
    model = enable(model_of("llama"))
    inputs = {key: value.flip(-1) for key, value in prompts().items()}
    with pytest.raises(HeadwiseError, match="left"):
        model.generate(**inputs, max_new_tokens=2)


def test_an_adapter_on_the_up_projection_is_refused() -> None:
    model = model_of("deepseek_v3")
    attention = model.model.layers[1].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)
    with pytest.raises(HeadwiseError, match=r"layers.1.self_attn.kv_b_proj"):
        enable(model)
    assert model.config._attn_implementation == "sdpa"


def test_enable_and_disable_leave_no_trace() -> None:
    model = model_of("deepseek_v3")
    before = set(vars(model)), set(vars(model.model.layers[0].self_attn)), model.config._attn_implementation
    disable(enable(enable(model)))
    assert before == (
        set(vars(model)),
        set(vars(model.model.layers[0].self_attn)),
        model.config._attn_implementation,
    )


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = dict(COMMON, hidden_size=512, num_attention_heads=14, num_hidden_layers=4)
GPU_CONFIGS = {
    "latent": DeepseekV3Config(
        **{**GPU, "hidden_size": 448},
        **{**LATENT, "num_key_value_heads": 14, "kv_lora_rank": 256, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
           "v_head_dim": 64, "first_k_dense_replace": 4},
    ),
    "grouped": LlamaConfig(**{**GPU, "hidden_size": 896}, num_key_value_heads=2),
}  # fmt: skip


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", GPU_CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_bfloat16_on_a_gpu(name: str, cache: str) -> None:
    """With the kernels (compiled by transformers on a static cache) the error to float32 is no larger."""
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(copy.deepcopy(GPU_CONFIGS[name])).eval().cuda()
    model = copy.deepcopy(exact).bfloat16()
    inputs = {key: value.cuda() for key, value in prompts().items()}
    # The same tokens for all models: the logits are compared, not the generated path.
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    options |= {} if cache == "dynamic" else {"cache_implementation": "static"}

    def logits(model) -> torch.Tensor:
        return torch.stack(model.generate(**inputs, **options).logits).float()[:2]

    expected, stock, ours = logits(exact), logits(model), logits(enable(model))
    assert (ours - expected).norm() < 1.3 * (stock - expected).norm() + 1e-3 * expected.norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_one_graph_on_a_gpu(name: str) -> None:
    """A decode step compiles without a break and replays as a CUDA graph."""
    torch.manual_seed(0)
    model = enable(AutoModelForCausalLM.from_config(copy.deepcopy(GPU_CONFIGS[name])).eval().cuda().bfloat16())
    ids = prompts()["input_ids"].cuda()
    step = torch.compile(model, fullgraph=True, mode="reduce-overhead")

    def logits(step) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(ids[:, :16], **cache_argument(model, cache))
            steps = [step(ids[:, t : t + 1], **cache_argument(model, cache)).logits.clone() for t in range(16, 20)]
        return torch.cat(steps, 1)

    expected = logits(model)
    assert (logits(step) - expected).norm() < 2e-2 * expected.norm()


INDEXED = dict(index_topk=9, index_n_heads=3, index_head_dim=24) | LATENT | dict(q_lora_rank=32)
SELECTING = {
    "an indexer in every layer": DeepseekV32Config(**COMMON, **INDEXED),
    "a shared indexer": GlmMoeDsaConfig(**COMMON, **INDEXED, indexer_types=["full", "shared"]),
}


@pytest.mark.parametrize("name", SELECTING)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_model_with_indexers_decodes_on_the_selected_keys(name, cache) -> None:
    """Prompts beyond the budget of keys, and one within it for the first steps."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(SELECTING[name])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)  # so that attention is far from even
    inputs = prompts()
    inputs["attention_mask"][0, :13] = 0
    inputs["input_ids"][0, :13] = 0
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    expected = model.generate(**inputs, **options)
    actual = enable(model).generate(**inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, stock in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "headwise_selected"
    disable(model)
    assert model.config._attn_implementation == "sdpa"
