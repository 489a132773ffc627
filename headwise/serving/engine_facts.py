"""Facts of a model and of its server that the rules of engines.yaml check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headwise.io.quantized.powers import POWERS
from headwise.serving.kernel_shapes import MULTIPLE, WIDEST, fa3_decodes, fa3_serves, fits_padded_prefill

# Numbers of layers for which llama.cpp expects a single query projection; the last one only with its vocabulary.
DIRECT_QUERY_DEPTHS = ((26, None), (27, None), (48, 128256))
# An attention factor or a factor beyond this is no default, and may exceed a float.
LARGEST = 10**9
# The parameters of DeepSeek's YaRN.
YARN_NEEDS = {"factor", "original_max_position_embeddings"}
YARN_MAY = {"type", "rope_type", "rope_theta", "beta_fast", "beta_slow"}
MSCALES = {"mscale", "mscale_all_dim"}
# The largest kv_lora_rank whose decode was read in engines that take every rank.
LARGEST_RANK = 1024


@dataclass(frozen=True)
class Deployment:
    """What a forecast knows of the server.

    Attributes:
        gpu: "hopper", "blackwell", "amd", "other" (an older GPU of NVIDIA's) or "unknown".
        cache_dtype: element type of its cache.
        context_parallel: whether several GPUs divide the cache of a sequence.
    """

    gpu: str = "unknown"
    cache_dtype: str = "bf16"
    context_parallel: bool = False


NOT_KNOWN = Deployment()


def engine_facts(
    config: Mapping[str, Any], *, window: bool = False, tokenizer: str = "none", deployment: Deployment = NOT_KNOWN
) -> dict[str, Any]:
    """Return the facts of a model that the rules check.

    Args:
        config: the config.json.
        window: whether a layer has a sliding window.
        tokenizer: the kind of its vocabulary, see `headwise.io.tokenizer.tokenizer_kind`.
        deployment: of the server.
    """
    named = config.get("architectures")
    stock_class = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    kind, factor = _rope_facts(config)
    latent_kind = "deepseek yarn" if kind == "yarn" and _is_deepseek_yarn(config) else kind
    facts = {
        "stock_class": stock_class,
        "window": window,
        "tokenizer": tokenizer,
        "rope_type": kind,
        "rope_attention_factor": factor,
        "quantization": _quantization(config),
        **asdict(deployment),
    }
    sizes: list[Any] = [
        config.get(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    ]
    # Other classes pass over such a field: a stray one makes no MLA.
    if not all(isinstance(size, int) for size in sizes):
        return facts
    rank, nope, rope, value = sizes
    return facts | {
        "cache_row": rank + rope,
        "latent_rope_type": latent_kind,
        "large_rank": rank > LARGEST_RANK,
        "head_dims": f"{nope}/{rope}/{value}",
        "shape": f"{rank}+{rope} {nope}/{rope}/{value}",
        "wide_heads": max(nope + MULTIPLE, value) > WIDEST,
        "padded_prefill": fits_padded_prefill(nope, rope, value),
        "fa3": fa3_serves(rank, nope, rope, value),
        "fa3_decodes": fa3_decodes(rank, rope),
        "attention_bias": config.get("attention_bias", False),
        "rope_interleave": config.get("rope_interleave", True),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "rms_norm_eps": config.get("rms_norm_eps"),
        "hidden_act": config.get("hidden_act", "silu"),
        "latent_rows": "powers" if config.get(POWERS) else "small" if has_linear_norm(config) else "usual",
        "sparse": config.get("index_topk") is not None,
        "index_head_dim": config.get("index_head_dim"),
        "queries": "direct" if config.get("q_lora_rank") is None else "factored",
        "direct_query_depth": has_direct_query_depth(config.get("num_hidden_layers"), config.get("vocab_size")),
        "experts_exceed_groups": _count(config, "n_routed_experts") > _count(config, "n_group"),
    }


def has_linear_norm(config: Mapping[str, Any]) -> bool:
    """Return whether an MLA config is of headwise, whose latent norm is linear and follows very small rows.

    Args:
        config: the config.json.
    """
    from headwise.models.mla_source import written_class  # it loads torch, which settings do without

    return written_class(config) is not None


def _quantization(config: Mapping[str, Any]) -> str:
    """Return the `quant_method` of a config, or "none"."""
    entry = config.get("quantization_config")
    return str(entry.get("quant_method")) if isinstance(entry, Mapping) else "none"


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0


def _rope_parameters(config: Mapping[str, Any]) -> Any:
    """Return the rotary parameters of a config, in either spelling; empty without any."""
    text = config.get("text_config") or config
    text = text if isinstance(text, Mapping) else config
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _is_deepseek_yarn(config: Mapping[str, Any]) -> bool:
    """Return whether YaRN has the parameters of DeepSeek's only, which transformers and engines read alike.

    With one mscale of the two, or with zero, transformers computes another attention factor.
    """
    parameters = _rope_parameters(config)
    given = {name for name, value in parameters.items() if value is not None}
    mscales = [parameters[name] for name in given & MSCALES]
    return given - MSCALES - YARN_MAY == YARN_NEEDS and len(mscales) != 1 and all(mscales)


def _rope_facts(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the rope type, and whether its attention factor is the default of its type."""
    parameters = _rope_parameters(config)
    if not isinstance(parameters, Mapping):
        return "unknown", "other"
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return "per layer type", "default"
    given, factor = parameters.get("attention_factor"), parameters.get("factor")
    usual = given is None
    if isinstance(given, int | float) and isinstance(factor, int | float) and abs(given) + abs(factor) < LARGEST:
        usual = math.isclose(given, 0.1 * math.log(max(factor, 1)) + 1)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return kind if isinstance(kind, str) else "unknown", "default" if usual else "other"


def has_direct_query_depth(num_hidden_layers: int | None, vocab_size: int | None) -> bool:
    """Return whether llama.cpp reads a single query projection in a model of this depth.

    Args:
        num_hidden_layers: of the model; None: not known.
        vocab_size: of the model; None: not known.
    """
    return any(num_hidden_layers == n and size in (None, vocab_size) for n, size in DIRECT_QUERY_DEPTHS)
