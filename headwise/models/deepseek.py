"""LatentWeights -> the tensors and the config of a stock DeepseekV3ForCausalLM, and back.

Pure (mathematics, sections 4a and 4b). Stock DeepSeek normalises the latent; a conversion has no norm there, so
the norm is made linear: the down-projection is scaled by a power of two so small that the norm sees nothing but
its own epsilon, and the norm's weight and the up-projection undo it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwise.models.layout import AttentionLayout, LatentWeights

# transformers fixes the latent norm's epsilon; other engines read `rms_norm_eps` for every norm. One value
# serves both only if it is this one.
NORM_EPS = 1e-6
NORM_TOLERANCE = 1e-8

ARCHITECTURES = ["DeepseekV3ForCausalLM"]
# Path of a decoder layer, in checkpoints and in the stock model, and the name of its attention module.
LAYERS, ATTENTION = "model.layers.{layer}", "self_attn"
COPIED_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def linear_norm(
    down: Tensor, up: Tensor, *, rms: float, tolerance: float = NORM_TOLERANCE
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear latent through a stock RMSNorm, as (down, norm weight, up) for `up @ norm(down @ x)`.

    Args:
        down: (rank, inputs). up: (outputs, rank).
        rms: root-mean-square of `down @ x` over tokens, which the result brings to 1.
        tolerance: relative error of a token of that size. A token k times larger gets k^2 times the error.
    """
    exponent, weight = _norm_scales(tolerance)
    down = down * (2.0**exponent / rms)
    up = up * (rms * math.sqrt(NORM_EPS) / (2.0**exponent * weight))
    return down, down.new_full((down.shape[0],), weight), up


def unscale_latent(down: Tensor, norm_weight: Tensor) -> Tensor:
    """The inverse: the down-projection with which the same up-projection needs no norm at all.

    Training has to happen in these coordinates: an optimizer's step would destroy weights of 1e-9.
    """
    return down * (norm_weight / math.sqrt(NORM_EPS))[:, None]


def unscaled_latent_rms(tolerance: float = NORM_TOLERANCE) -> float:
    """Root-mean-square, behind `natural_down`, of a latent that `linear_norm` brought to 1 before its scaling."""
    exponent, weight = _norm_scales(tolerance)
    return 2.0**exponent * weight / math.sqrt(NORM_EPS)


def _norm_scales(tolerance: float) -> tuple[int, float]:
    """The power of two that shrinks the latent, and the norm's weight."""
    exponent = math.floor(math.log2(math.sqrt(2 * NORM_EPS * tolerance)))
    return exponent, 2.0 ** (-exponent // 2)


def residual_scale(rms_norm_eps: float) -> float:
    """What to scale the residual stream by so that norms with another epsilon become norms with `NORM_EPS`."""
    return math.sqrt(NORM_EPS / rms_norm_eps)


def interleave(rows: Tensor) -> Tensor:
    """Half-split rotary rows (..., P, inputs) in DeepSeek's order: the two rows of a plane side by side."""
    half = rows.shape[-2] // 2
    return torch.stack([rows[..., :half, :], rows[..., half:, :]], dim=-2).flatten(-3, -2)


def half_split(rows: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    return torch.cat([rows[..., 0::2, :], rows[..., 1::2, :]], dim=-2)


def latent_rms(down: Tensor, moment: Tensor | None) -> float:
    """Root-mean-square of `down @ x`; without a moment, for inputs of unit size in every direction."""
    energy = (down * down).sum() if moment is None else ((down @ moment) * down).sum()
    return math.sqrt(float(energy) / down.shape[0]) or 1.0


def attention_tensors(
    latent: LatentWeights,
    prefix: str,
    *,
    residual: float = 1.0,
    o_bias: Tensor | None = None,
    v_head_dim: int | None = None,
    q_lora_rank: int | None = None,
    moment: Tensor | None = None,
    rms: float | None = None,
    tolerance: float = NORM_TOLERANCE,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The checkpoint tensors of one attention layer.

    Args:
        latent: the layer; its score scale is folded into the queries (stock: 1 / sqrt(head_dim)).
        prefix: "model.layers.3.self_attn".
        residual: what attention's output is multiplied by (`residual_scale`, Granite's multiplier).
        o_bias: (D,) the source's output bias, before `residual`.
        v_head_dim: pad the value heads with zeros to this width; costs weights, no cache.
        q_lora_rank: write the queries in two factors of this rank. Needed where queries have a bias, since
            only `q_a_proj` can have one; `query_rank` gives the smallest rank that loses nothing.
        moment: (inputs, inputs) second moment of the inputs, for the size of the latent.
        rms: that size itself, where it is known.
        tolerance: of the linear norm, see `linear_norm`.
    """
    layout, inputs = latent.layout, latent.q_nope.shape[2]
    hidden, rank = latent.o.shape[1], latent.kv_down.shape[0]
    width = v_head_dim or layout.v_head_dim
    if latent.q_nope.shape[2] > hidden and q_lora_rank is None:
        raise ValueError("queries with a bias need q_lora_rank")

    value_pad = (0, 0, 0, width - layout.v_head_dim)
    v_up = torch.nn.functional.pad(latent.v_up, value_pad)
    o = torch.nn.functional.pad(latent.o.transpose(1, 2), value_pad).flatten(0, 1).T * residual
    up = torch.cat([latent.k_up, v_up], dim=1).flatten(0, 1)
    rms = rms or latent_rms(latent.kv_down, moment)
    down, norm, up = linear_norm(latent.kv_down, up, rms=rms, tolerance=tolerance)
    kv_a = torch.cat([down, interleave(latent.k_rope)])
    queries = torch.cat([latent.q_nope, interleave(latent.q_rope)], dim=1).flatten(0, 1)
    queries = queries * (latent.scale * math.sqrt(layout.head_dim))

    tensors = {
        "kv_a_proj_with_mqa.weight": kv_a[:, :hidden],
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": up,
        "o_proj.weight": o,
    }
    if q_lora_rank is None:
        tensors["q_proj.weight"] = queries
    else:
        u, s, vh = torch.linalg.svd(queries, full_matrices=False)
        q_a, q_b = _pad_rank(vh, u * s, q_lora_rank)
        q_a, q_norm, q_b = linear_norm(q_a, q_b, rms=latent_rms(q_a, moment), tolerance=tolerance)
        tensors |= {
            "q_a_proj.weight": q_a[:, :hidden],
            "q_a_layernorm.weight": q_norm,
            "q_b_proj.weight": q_b,
        }
    if inputs > hidden or o_bias is not None:
        zero = kv_a.new_zeros(rank + layout.rotary_dim)
        tensors["kv_a_proj_with_mqa.bias"] = kv_a[:, hidden] if inputs > hidden else zero
        tensors["o_proj.bias"] = residual * (o_bias if o_bias is not None else kv_a.new_zeros(hidden))
        if q_lora_rank is not None:
            tensors["q_a_proj.bias"] = q_a[:, hidden] if inputs > hidden else q_a.new_zeros(q_lora_rank)
    return {f"{prefix}.{name}": tensor.to(dtype).contiguous() for name, tensor in sorted(tensors.items())}


def attention_shapes(
    layout: AttentionLayout,
    hidden_size: int,
    *,
    bias: bool = False,
    v_head_dim: int | None = None,
    q_lora_rank: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the name inside the attention module and the shape of every tensor of `attention_tensors`.

    Args:
        layout: of the MLA layer.
        hidden_size: of the model.
        bias: whether the projections have biases.
        v_head_dim: the padded width of value heads; None: the layout's own.
        q_lora_rank: the rank of queries in two factors; None: one projection.
    """
    heads, rank, rope_dim = layout.num_attention_heads, layout.kv_lora_rank or 0, layout.rotary_dim
    value, nope = v_head_dim or layout.v_head_dim, layout.head_dim - rope_dim
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_layernorm.weight": (rank,),
        "kv_a_proj_with_mqa.weight": (rank + rope_dim, hidden_size),
        "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden_size, heads * value),
    }
    if bias:
        shapes |= {"kv_a_proj_with_mqa.bias": (rank + rope_dim,), "o_proj.bias": (hidden_size,)}
    if q_lora_rank is None:
        return shapes | {"q_proj.weight": (heads * layout.head_dim, hidden_size)}
    shapes |= {
        "q_a_layernorm.weight": (q_lora_rank,),
        "q_a_proj.weight": (q_lora_rank, hidden_size),
        "q_b_proj.weight": (heads * layout.head_dim, q_lora_rank),
    }
    return shapes | ({"q_a_proj.bias": (q_lora_rank,)} if bias else {})


def query_rank(layout: AttentionLayout, hidden_size: int) -> int:
    """The `q_lora_rank` that holds the queries of a source layer with a bias exactly."""
    return min(layout.num_attention_heads * layout.head_dim, hidden_size + 1)


def _pad_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = max(rank - down.shape[0], 0)
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 0, missing))[:rank], pad(up, (0, missing))[:, :rank]


def read_attention(
    tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any], frequencies: Tensor
) -> LatentWeights:
    """What `attention_tensors` wrote, in natural coordinates and float64 (`residual` stays in `o`).

    The norms are taken to be linear, as this project writes them: for DeepSeek's own checkpoints this is wrong.
    """

    def read(name: str) -> Tensor:
        return tensors[f"{prefix}.{name}"].to(torch.float64)

    def projection(name: str) -> Tensor:
        weight = read(f"{name}.weight")
        return (
            torch.cat([weight, read(f"{name}.bias")[:, None]], 1) if f"{prefix}.{name}.bias" in tensors else weight
        )

    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    if config.get("q_lora_rank") is None:
        queries = projection("q_proj")
    else:
        queries = read("q_b_proj.weight") @ unscale_latent(projection("q_a_proj"), read("q_a_layernorm.weight"))
    kv_a = projection("kv_a_proj_with_mqa")
    if queries.shape[1] < kv_a.shape[1]:
        queries = torch.nn.functional.pad(queries, (0, 1))
    queries = queries.unflatten(0, (heads, nope + rope))
    up = read("kv_b_proj.weight").unflatten(0, (heads, nope + value))
    return LatentWeights(
        layout=AttentionLayout(heads, heads, nope + rope, value, rope, None, rank, rope),
        q_nope=queries[:, :nope],
        q_rope=half_split(queries[:, nope:]),
        kv_down=unscale_latent(kv_a[:rank], read("kv_a_layernorm.weight")),
        k_rope=half_split(kv_a[rank:]),
        k_up=up[:, :nope],
        v_up=up[:, nope:],
        o=read("o_proj.weight").unflatten(1, (heads, value)).transpose(0, 1),
        frequencies=frequencies,
        scale=(nope + rope) ** -0.5,
    )


def default_grid(theta: float, rope_dim: int) -> Tensor:
    """(rope_dim / 2,) the frequencies a stock config gives its rotary planes, radians per token."""
    return theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)


def rope_parameters(theta: float, frequencies: Tensor, max_position_embeddings: int) -> dict[str, Any]:
    """The rope entry of a config: plain when the frequencies are the default grid, else a longrope list.

    longrope divides the grid by a factor per plane, so any list of non-zero frequencies can be written. Short
    and long factors are equal, and the attention factor is 1: nothing depends on the length.
    """
    grid = default_grid(theta, 2 * len(frequencies))
    if torch.allclose(grid, frequencies.to(grid), rtol=1e-6, atol=0):
        return {"rope_type": "default", "rope_theta": theta}
    factors = (grid / frequencies.to(grid)).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
    }


def make_config(
    source: Mapping[str, Any],
    layout: AttentionLayout,
    *,
    theta: float,
    frequencies: Tensor,
    attention_bias: bool = False,
    q_lora_rank: int | None = None,
    v_head_dim: int | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """A stock dense DeepseekV3 `config.json` (why each value: engines.yaml).

    Args:
        source: the source's text config; only its layout-independent keys are carried over.
        layout: the MLA layout all layers share.
        theta, frequencies: see `rope_parameters`.
        attention_bias: whether `kv_a_proj_with_mqa` and `o_proj` have biases.
        q_lora_rank, v_head_dim: as given to `attention_tensors`.
    """
    rope = rope_parameters(theta, frequencies, source["max_position_embeddings"])
    position_free = layout.head_dim - layout.rotary_dim
    return {
        "architectures": ARCHITECTURES,
        "model_type": "deepseek_v3",
        **{key: source[key] for key in COPIED_CONFIG_KEYS if key in source},
        "dtype": dtype,
        "torch_dtype": dtype,
        "attention_bias": attention_bias,
        "attention_dropout": 0.0,
        "num_key_value_heads": layout.num_attention_heads,
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": layout.kv_lora_rank,
        "qk_nope_head_dim": position_free,
        "qk_rope_head_dim": layout.rotary_dim,
        "v_head_dim": v_head_dim or layout.v_head_dim,
        "rms_norm_eps": NORM_EPS,
        "rope_interleave": True,
        "rope_parameters": rope,
        # For readers of transformers 4.
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else {**rope, "type": "longrope"},
        "tie_word_embeddings": False,
        # Every layer dense; the rest describes experts that no layer has.
        "first_k_dense_replace": source["num_hidden_layers"],
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": source["intermediate_size"],
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }
