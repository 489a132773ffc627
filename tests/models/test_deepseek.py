"""What is written as DeepSeek loads with the stock class and computes the parent's function."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SmolLM3Config,
)

from headwise.compat import cache_of
from headwise.convert.mla.exact import exact_mla, exact_mla_shape
from headwise.errors import HeadwiseError
from headwise.models import deepseek, mla_source
from headwise.models.layout import AttentionLayout, LayerWeights

TINY = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)


def make(config, seed=0):
    """A random model whose weights are large enough that attention is not uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def read_layer(model, layer):
    """LayerWeights of a stock Llama-like module, in float64."""
    config, module = model.config, model.model.layers[layer].self_attn
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads

    def joined(linear):
        weight = linear.weight.detach().double()
        return weight if linear.bias is None else torch.cat([weight, linear.bias.detach().double()[:, None]], 1)

    if hasattr(module, "qkv_proj"):
        q, k, v = joined(module.qkv_proj).split([heads * d, groups * d, groups * d])
    else:
        q, k, v = joined(module.q_proj), joined(module.k_proj), joined(module.v_proj)
    o = module.o_proj.weight.detach().double().unflatten(1, (heads, d)).transpose(0, 1)
    rotary = int(d * config.rope_parameters.get("partial_rotary_factor", 1.0))
    if not getattr(config, "no_rope_layers", [1] * (layer + 1))[layer]:
        rotary = 0
    return LayerWeights(
        AttentionLayout(heads, groups, d, d, rotary),
        q.unflatten(0, (heads, d)),
        k.unflatten(0, (groups, d)),
        v.unflatten(0, (groups, d)),
        o,
    )


def export(model, to_latent, *, dtype=torch.float32, tolerance=deepseek.NORM_TOLERANCE, q_lora_rank=None):
    """(config, tensors) of a model whose layers `to_latent` turned into LatentWeights."""
    source_config = model.config.to_dict()
    source = mla_source.find_mla_source(source_config, dtype)
    layers = [to_latent(read_layer(model, i)) for i in range(model.config.num_hidden_layers)]
    biased = layers[0].q_nope.shape[2] > model.config.hidden_size
    if biased:
        q_lora_rank = deepseek.query_rank(read_layer(model, 0).layout, model.config.hidden_size)
    config = deepseek.make_config(
        source_config,
        layers[0].layout,
        theta=model.config.rope_parameters["rope_theta"],
        frequencies=layers[0].frequencies,
        attention_bias=biased,
        q_lora_rank=q_lora_rank,
        dtype=str(dtype).removeprefix("torch."),
        stock=source.stock,
        experts=source.experts,
    )
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    attention = [name for name in state if ".self_attn." in name]
    tensors = {
        c.name: (rows_of(c, state[c.source]).double() * c.factor).to(dtype)
        for c in mla_source.plan_scaled_copies(source, state, attention)
    }
    for i, layer in enumerate(layers):
        o_bias = model.model.layers[i].self_attn.o_proj.bias
        tensors |= deepseek.attention_tensors(
            layer,
            f"model.layers.{i}.self_attn",
            residual=source.factors["residual"],
            o_bias=None if o_bias is None else o_bias.detach().double(),
            q_lora_rank=q_lora_rank,
            tolerance=tolerance,
            dtype=dtype,
        )
    return config, tensors


def rows_of(copy, tensor):
    """Return the rows of a source tensor that a scaled copy has."""
    return tensor.chunk(copy.part[1])[copy.part[0]] if copy.part else tensor


def reload(config, tensors, folder, dtype):
    """Write the folder and load it as a user does: the config file decides everything."""
    (folder / "config.json").write_text(json.dumps(config))
    # Clones, because tied source weights share memory and safetensors refuses that.
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert type(model) is DeepseekV3ForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def exact(model, **shape):
    frequencies = model.model.rotary_emb.inv_freq.double()
    source = mla_source.find_mla_source(model.config.to_dict())

    def to_latent(weights):
        scale = source.attention_scale or weights.layout.head_dim**-0.5
        return exact_mla(weights, frequencies, scale=scale, **shape)

    return to_latent


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


TOKENS = torch.arange(40).reshape(2, 20) * 7 % 61

SOURCES = {
    "mha": LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5),
    "gqa, tied": LlamaConfig(**TINY, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True),
    "mqa": LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=1, head_dim=16),
    "odd heads": LlamaConfig(
        **{**TINY, "hidden_size": 72}, num_attention_heads=9, num_key_value_heads=3, head_dim=8
    ),
    "all biases": LlamaConfig(
        **TINY, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, rms_norm_eps=1e-5
    ),
    "mistral": MistralConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**{**TINY, "hidden_size": 112}, num_attention_heads=14, num_key_value_heads=2, head_dim=8),
    "phi3": Phi3Config(
        **TINY,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
    ),
    "granite": GraniteConfig(
        **TINY,
        num_attention_heads=4,
        num_key_value_heads=2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.5,
        attention_multiplier=0.2,
        rms_norm_eps=1e-5,
    ),
    "smollm3": SmolLM3Config(**TINY, num_attention_heads=4, num_key_value_heads=2, no_rope_layers=[1, 0]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_exact_lift_reloads_as_stock_deepseek_with_the_same_logits(name, tmp_path):
    parent = make(SOURCES[name])
    shapes = [exact_mla_shape(read_layer(parent, i).layout) for i in range(2)]
    rank, rope_dim = (max(column) for column in zip(*shapes, strict=True))
    config, tensors = export(parent, exact(parent, rank=rank, rope_dim=rope_dim))
    child = reload(config, tensors, tmp_path, torch.float32)
    assert relative(logits(child, TOKENS), logits(parent, TOKENS)) < 1e-5


def test_exact_lift_in_float64_is_exact_to_the_norms_tolerance(tmp_path):
    parent = make(SOURCES["mqa"]).double()
    config, tensors = export(parent, exact(parent), dtype=torch.float64, tolerance=1e-13)
    child = reload(config, tensors, tmp_path, torch.float64)
    # The norms of both models round to float32 inside; at 1e-9 this would see any error of the algebra.
    assert relative(logits(child, TOKENS), logits(parent, TOKENS)) < 1e-6


def test_the_norm_is_linear_for_a_token_that_the_text_lacks():
    """The text has inputs in three directions; a rare token of the same size has a latent 1,000 times as large."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    down[:, :3] *= 1e-3
    moment = torch.diag(torch.cat([torch.full((3,), 8.0), torch.zeros(21)]).double())
    rare = torch.zeros(24, dtype=torch.float64)
    rare[3] = math.sqrt(24)
    assert (down @ rare).norm() / math.sqrt(6) > 900 * deepseek.latent_rms(down, moment)
    up = torch.eye(6, dtype=torch.float64)
    small, weight, back = deepseek.linear_norm(down, up, rms=deepseek.latent_size(down, moment))
    latent = small @ rare
    normed = weight * latent * torch.rsqrt(latent.square().mean() + deepseek.NORM_EPS)
    torch.testing.assert_close(back @ normed, down @ rare, rtol=1e-5, atol=0)
    full = torch.eye(24, dtype=torch.float64)
    assert deepseek.latent_size(down, full) == deepseek.latent_rms(down, full)


def test_the_cache_holds_rank_plus_rope_dim_numbers(tmp_path):
    parent = make(SOURCES["mqa"])
    config, tensors = export(parent, exact(parent))
    child = reload(config, tensors, tmp_path, torch.float32)
    out = child.generate(TOKENS[:1, :5], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    layer = cache_of(out).layers[0]
    numbers = layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel()
    assert numbers == read_layer(parent, 0).layout.cache_elements_per_token
    expected = parent.generate(TOKENS[:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(out.sequences, expected)


def test_padded_heads_change_nothing(tmp_path):
    parent = make(SOURCES["gqa, tied"])
    convert = exact(parent)
    config, tensors = export(parent, lambda layer: deepseek.pad_heads(convert(layer), 17, 16))
    assert (config["qk_nope_head_dim"], config["v_head_dim"]) == (17, 16)
    child = reload(config, tensors, tmp_path, torch.float32)
    assert relative(logits(child, TOKENS), logits(parent, TOKENS)) < 1e-5


@pytest.mark.parametrize("name", ["mha", "gqa, tied"])
def test_queries_in_two_factors_change_nothing(name, tmp_path):
    parent = make(SOURCES[name])
    hidden = parent.config.hidden_size
    config, tensors = export(parent, exact(parent), q_lora_rank=hidden)
    first = tensors["model.layers.1.self_attn.q_a_proj.weight"]
    assert config["q_lora_rank"] == hidden and torch.equal(first, first[0, 0] * torch.eye(hidden))
    assert math.log2(first[0, 0]).is_integer(), "bfloat16 holds the factor exactly"
    child = reload(config, tensors, tmp_path, torch.float32)
    assert relative(logits(child, TOKENS), logits(parent, TOKENS)) < 1e-5


@pytest.mark.parametrize("name", ["mha", "qwen2", "granite"])
def test_bfloat16_output_is_as_close_as_the_parents_own(name, tmp_path):
    parent = make(SOURCES[name]).bfloat16()
    reference = make(SOURCES[name])
    reference.load_state_dict(parent.state_dict())
    config, tensors = export(reference, exact(reference), dtype=torch.bfloat16)
    child = reload(config, tensors, tmp_path, torch.bfloat16)
    truth = logits(reference.double(), TOKENS)

    def error(model):
        return float((logits(model, TOKENS).double() - truth).square().mean().sqrt())

    assert error(child) < 1.5 * error(parent)


def test_read_attention_is_the_inverse(tmp_path):
    parent = make(SOURCES["all biases"])
    config, tensors = export(parent, exact(parent), dtype=torch.float64)
    wanted = exact(parent)(read_layer(parent, 1))
    got = deepseek.read_attention(tensors, "model.layers.1.self_attn", config, wanted.frequencies)
    # Latent coordinates may be rescaled; products may not.
    torch.testing.assert_close(got.k_rope, wanted.k_rope)
    torch.testing.assert_close(got.v_up @ got.kv_down, wanted.v_up @ wanted.kv_down)
    torch.testing.assert_close(got.q_rope * got.scale, wanted.q_rope * wanted.scale)
    torch.testing.assert_close(
        got.o / mla_source.find_mla_source(parent.config.to_dict()).factors["residual"], wanted.o
    )


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (dict(model_type="olmo2"), "outputs of attention"),
        (dict(model_type="qwen2_moe"), "shared expert"),
        (dict(model_type="starcoder2"), "LayerNorm"),
        (dict(model_type="llama", mlp_bias=True), "mlp_bias"),
    ],
)
def test_what_stock_deepseek_cannot_express_is_refused(config, word):
    with pytest.raises(HeadwiseError, match=word):
        mla_source.find_mla_source(config)


def test_float16_is_refused():
    with pytest.raises(HeadwiseError, match="float16"):
        mla_source.find_mla_source(dict(model_type="llama"), torch.float16)


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(HeadwiseError, match=r"extra\.weight"):
        mla_source.plan_scaled_copies(mla_source.find_mla_source(dict(model_type="llama")), ["extra.weight"], [])
