"""Convert LatentWeights to the tensors and the config of a stock DeepseekV3ForCausalLM, and back.

Pure functions (mathematics, sections 4a and 4b). Stock DeepSeek normalises the latent, and a converted layer has no
norm there. So the norm is made linear: a small power of two scales the down-projection until the norm's epsilon
dominates. The norm's weight and the up-projection undo that scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from headwise.models.layout import AttentionLayout, LatentWeights

# transformers fixes the latent norm's epsilon; other engines read `rms_norm_eps` for every norm. One value
# serves both only if it is this one.
NORM_EPS = 1e-6
NORM_TOLERANCE = 1e-8
# A token's latent may be this much larger than the size that is brought to 1; its error is then 2.6e-6.
LARGER_LATENTS = 16

# Projections whose rows differ in size by many powers of two: one scale for many rows would lose the small ones.
KEPT_IN_FULL = ("kv_a_proj_with_mqa", "q_a_proj", "q_b_proj", "wk", "weights_proj")
# The norm before attention, and all projections that read what it returns.
INPUT_NORM, INPUT_READERS = "input_layernorm", ("kv_a_proj_with_mqa", "q_proj", "q_a_proj", "wk", "weights_proj")
# The tensors of an indexer whose rows RoPE rotates.
ROTATED = ("indexer.wq_b.weight", "indexer.wk.weight", "indexer.k_norm.weight", "indexer.k_norm.bias")
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
    """Scale a linear latent so that a stock RMSNorm between its two projections acts linearly.

    Args:
        down: (rank, inputs) the down-projection.
        up: (outputs, rank) the up-projection.
        rms: size of `down @ x`, which the result brings to 1; see `latent_size`.
        tolerance: relative error of a token of that size. A token k times larger gets k^2 times the error.

    Returns:
        (down, norm weight, up) for `up @ norm(down @ x)`.
    """
    exponent, weight = norm_scales(tolerance)
    down = down * (2.0**exponent / rms)
    up = up * (rms * math.sqrt(NORM_EPS) / (2.0**exponent * weight))
    return down, down.new_full((down.shape[0],), weight), up


def unscale_latent(down: Tensor, norm_weight: Tensor) -> Tensor:
    """Return the down-projection that needs no norm before the same up-projection; the inverse of `linear_norm`.

    Training uses this norm-free parametrization, because an optimizer step would destroy weights of 1e-9.

    Args:
        down: (rank, inputs) the scaled down-projection.
        norm_weight: (rank,) the weight of the latent norm.
    """
    return down * (norm_weight / math.sqrt(NORM_EPS))[:, None]


def unscaled_latent_rms(tolerance: float = NORM_TOLERANCE) -> float:
    """Return the root-mean-square, after `unscale_latent`, of a latent that `linear_norm` has scaled.

    Args:
        tolerance: the tolerance that `linear_norm` used.
    """
    exponent, weight = norm_scales(tolerance)
    return 2.0**exponent * weight / math.sqrt(NORM_EPS)


def norm_scales(tolerance: float) -> tuple[int, float]:
    """Return the exponent of the power of two that shrinks the latent, and the norm's weight.

    Args:
        tolerance: as in `linear_norm`.
    """
    exponent = math.floor(math.log2(math.sqrt(2 * NORM_EPS * tolerance)))
    return exponent, 2.0 ** (-exponent // 2)


def residual_scale(rms_norm_eps: float) -> float:
    """Return the residual-stream factor that turns norms with another epsilon into norms with `NORM_EPS`.

    Args:
        rms_norm_eps: epsilon of the source's norms.
    """
    return math.sqrt(NORM_EPS / rms_norm_eps)


def interleave(rows: Tensor) -> Tensor:
    """Return half-split rotary rows in DeepSeek's order, with the two rows of a plane side by side.

    Args:
        rows: (..., P, inputs) half-split rotary rows.
    """
    half = rows.shape[-2] // 2
    return torch.stack([rows[..., :half, :], rows[..., half:, :]], dim=-2).flatten(-3, -2)


def half_split(rows: Tensor) -> Tensor:
    """Return rotary rows in half-split order; the inverse of `interleave`.

    Args:
        rows: (..., P, inputs) interleaved rotary rows.
    """
    return torch.cat([rows[..., 0::2, :], rows[..., 1::2, :]], dim=-2)


def interleaved_rows(name: str, tensor: Tensor, heads: int, rotary: int, *, back: bool = False) -> Tensor:
    """Return a tensor of an indexer for RoPE that rotates neighbouring elements, in place of the two halves.

    Args:
        name: of the tensor, which ends in one of `ROTATED`.
        tensor: its values.
        heads: number of index queries.
        rotary: number of rotary elements, the first ones of a query and of the key.
        back: return the inverse.
    """
    rows = tensor.unflatten(0, (heads if "wq_b" in name else 1, -1))
    rows = rows[..., None] if tensor.dim() == 1 else rows
    turned = (half_split if back else interleave)(rows[:, :rotary])
    return torch.cat([turned, rows[:, rotary:]], 1).reshape(tensor.shape)


def latent_rms(down: Tensor, moment: Tensor | None) -> float:
    """Return the root-mean-square of `down @ x`.

    Args:
        down: (rank, inputs) the down-projection.
        moment: (inputs, inputs) second moment of the inputs; None: inputs have unit size in every direction.
    """
    energy = (down * down).sum() if moment is None else ((down @ moment) * down).sum()
    return math.sqrt(float(energy) / down.shape[0]) or 1.0


def latent_size(down: Tensor, moment: Tensor | None) -> float:
    """Return the size of a latent by which `linear_norm` scales it, so that its norm is linear for every token.

    This is the root-mean-square over tokens; or more, where an input of the usual norm could give a latent over
    `LARGER_LATENTS` times as large. Text rarely holds all tokens of a vocabulary, and a norm before the attention
    gives all inputs nearly one size. No latent exceeds the product of that size and of the matrix's own.

    Args:
        down: (rank, inputs) the down-projection.
        moment: (inputs, inputs) second moment of the inputs; None: inputs have unit size in every direction.
    """
    size_of_input = float(down.shape[1] if moment is None else moment.diagonal().sum())
    largest = math.sqrt(float((down * down).sum()) * size_of_input / down.shape[0])
    return max(latent_rms(down, moment), largest / LARGER_LATENTS)


def attention_tensors(
    latent: LatentWeights,
    prefix: str,
    *,
    residual: float = 1.0,
    o_bias: Tensor | None = None,
    q_lora_rank: int | None = None,
    moment: Tensor | None = None,
    rms: float | None = None,
    tolerance: float = NORM_TOLERANCE,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Build the checkpoint tensors of one attention layer.

    Args:
        latent: the layer; its score scale is folded into the queries (stock: 1 / sqrt(head_dim)).
        prefix: "model.layers.3.self_attn".
        residual: factor on the attention output (`residual_scale`, Granite's multiplier).
        o_bias: (D,) the source's output bias, before `residual`.
        q_lora_rank: write the queries in two factors of this rank. Queries with a bias need it, since only
            `q_a_proj` can have a bias. `query_rank` gives the smallest rank that is exact. With the number of
            inputs (`hidden_size`, and 1 for a bias), `q_a_proj` is a multiple of the identity.
        moment: (inputs, inputs) second moment of the inputs, which gives the size of the latent.
        rms: root-mean-square of the latent, if known. It replaces `moment` for the latent.
        tolerance: of the linear norm, see `linear_norm`.
        dtype: dtype of the returned tensors.

    Returns:
        Tensors by their names in the checkpoint.

    Raises:
        ValueError: the queries have a bias, and `q_lora_rank` is None.
    """
    layout, inputs = latent.layout, latent.q_nope.shape[2]
    hidden, rank = latent.o.shape[1], latent.kv_down.shape[0]
    if latent.q_nope.shape[2] > hidden and q_lora_rank is None:
        raise ValueError("queries with a bias need q_lora_rank")

    o = latent.o.transpose(1, 2).flatten(0, 1).T * residual
    up = torch.cat([latent.k_up, latent.v_up], dim=1).flatten(0, 1)
    rms = rms or latent_size(latent.kv_down, moment)
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
        q_a, q_b = _query_factors(queries, q_lora_rank)
        # A power of two keeps the rounding of `q_b_proj` the only one.
        q_rms = 2.0 ** math.ceil(math.log2(latent_size(q_a, moment)))
        q_a, q_norm, q_b = linear_norm(q_a, q_b, rms=q_rms, tolerance=tolerance)
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


def pad_heads(latent: LatentWeights, nope: int, value: int) -> LatentWeights:
    """Pad the heads of a layer with zeros: the same function, more weights, and the same cache.

    Args:
        latent: the layer.
        nope: position-free width of queries and keys afterwards.
        value: width of the values afterwards.
    """
    layout = latent.layout
    more_keys, more_values = nope - latent.q_nope.shape[1], value - layout.v_head_dim
    pad = torch.nn.functional.pad
    return replace(
        latent,
        layout=replace(layout, head_dim=layout.head_dim + more_keys, v_head_dim=value),
        q_nope=pad(latent.q_nope, (0, 0, 0, more_keys)),
        k_up=pad(latent.k_up, (0, 0, 0, more_keys)),
        v_up=pad(latent.v_up, (0, 0, 0, more_values)),
        o=pad(latent.o, (0, more_values)),
    )


def attention_shapes(
    layout: AttentionLayout,
    hidden_size: int,
    *,
    bias: bool = False,
    q_lora_rank: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the name inside the attention module and the shape of every tensor of `attention_tensors`.

    Args:
        layout: of the MLA layer.
        hidden_size: of the model.
        bias: whether the projections have biases.
        q_lora_rank: the rank of queries in two factors; None: one projection.
    """
    heads, rank, rope_dim = layout.num_attention_heads, layout.kv_lora_rank or 0, layout.rotary_dim
    value, nope = layout.v_head_dim, layout.head_dim - rope_dim
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
    """Return the `q_lora_rank` that holds the queries of a source layer with a bias exactly.

    Args:
        layout: layout of the layer.
        hidden_size: width of the residual stream.
    """
    return min(layout.num_attention_heads * layout.head_dim, hidden_size + 1)


def _query_factors(queries: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (rank, inputs) and (outputs, rank) of queries (outputs, inputs), before the norm."""
    if rank == queries.shape[1]:
        return torch.eye(rank, dtype=queries.dtype, device=queries.device), queries
    u, s, vh = torch.linalg.svd(queries, full_matrices=False)
    return _pad_rank(vh, u * s, rank)


def _pad_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = max(rank - down.shape[0], 0)
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 0, missing))[:rank], pad(up, (0, missing))[:, :rank]


def read_attention(
    tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any], frequencies: Tensor
) -> LatentWeights:
    """Read the tensors of `attention_tensors` into the norm-free parametrization, in float64.

    The norms are assumed to be linear, as headwise writes them. DeepSeek's own checkpoints do not satisfy this
    assumption.

    Args:
        tensors: the layer's tensors, by their names in the checkpoint.
        prefix: "model.layers.3.self_attn".
        config: the MLA config.json.
        frequencies: (P / 2,) radians per token of each rotary plane.

    Returns:
        The layer's weights. The factor `residual` remains in `o`.
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
    """Return the frequencies that a stock config gives its rotary planes: (rope_dim / 2,), radians per token.

    Args:
        theta: the RoPE base.
        rope_dim: number of rotary dimensions.
    """
    return theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)


def rope_parameters(
    theta: float, frequencies: Tensor, max_position_embeddings: int, plain: bool = True
) -> dict[str, Any]:
    """Return the rope entry of a config: plain if the frequencies are the default grid, else a longrope list.

    longrope divides the grid by a factor per plane, so it can hold any list of non-zero frequencies. Short and long
    factors are equal, and the attention factor is 1, so nothing depends on the length.

    Args:
        theta: the RoPE base.
        frequencies: (P / 2,) radians per token of each rotary plane.
        max_position_embeddings: of the config.
        plain: whether the plain entry of the stock class gives these frequencies; else the list is written anyway.
    """
    grid = default_grid(theta, 2 * len(frequencies))
    if plain and torch.allclose(grid, frequencies.to(grid), rtol=1e-6, atol=0):
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
    dtype: str = "bfloat16",
    stock: Any,
    experts: Mapping[str, Any],
) -> dict[str, Any]:
    """Build the `config.json` of a stock class with MLA (engines.yaml gives the reason for each value).

    Args:
        source: the source's text config; only its layout-independent keys are copied.
        layout: the MLA layout of all layers.
        theta: the RoPE base, see `rope_parameters`.
        frequencies: radians per token of each rotary plane, see `rope_parameters`.
        attention_bias: whether `kv_a_proj_with_mqa` and `o_proj` have biases.
        q_lora_rank: rank of the query factors, as in `attention_tensors`.
        dtype: name of the dtype of the weights.
        stock: the `StockMla` of the result.
        experts: fields that describe a mixture of experts; empty for a dense model.

    Returns:
        The config as a dictionary.
    """
    longest = source["max_position_embeddings"]
    rope = rope_parameters(theta, frequencies, longest, stock.plain_rope)
    if stock.rope:
        rope |= {"original_max_position_embeddings": longest, **stock.rope}
        rope["partial_rotary_factor"] = exact_share(layout.rotary_dim, layout.head_dim)
    position_free = layout.head_dim - layout.rotary_dim
    return {
        "architectures": [stock.architecture],
        "model_type": stock.model_type,
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
        "v_head_dim": layout.v_head_dim,
        "rms_norm_eps": NORM_EPS,
        "rope_interleave": True,
        "rope_parameters": rope,
        # For readers of transformers 4.
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else {**rope, "type": "longrope"},
        "tie_word_embeddings": False,
        # Every layer dense; the rest describes experts that no layer has.
        "first_k_dense_replace": source["num_hidden_layers"],
        # llama.cpp aborts unless there are more experts than groups.
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": source["intermediate_size"],
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        **stock.config,
        **experts,
        **(asdict(layout.indexer) if layout.indexer else {}),
    }


def exact_share(part: int, whole: int) -> float:
    """Return a factor of `whole` whose product is not below `part`, since stock classes cut off its fraction.

    Args:
        part: number of rotary dimensions.
        whole: width of a head.
    """
    share = part / whole
    while int(whole * share) < part:
        share = math.nextafter(share, 1)
    return share
