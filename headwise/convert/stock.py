"""What the stock config class of transformers makes of a config.json, behind the checks that it lacks."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

from headwise.errors import HeadwiseError

# A hostile layer count would make the stock config class build a list of that length.
MAX_LAYERS = 10_000
SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "hidden_size",
    "head_dim",
)
PER_LAYER = ("layer_types", "no_rope_layers")
QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")


def refuse_quantised(config: dict[str, Any]) -> None:
    """Raise HeadwiseError for a checkpoint whose weights are not plain numbers."""
    for key in QUANTIZATION_KEYS:
        value = config.get(key)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise HeadwiseError(
                f"config.json has {key}: the checkpoint is quantised ({method or 'method not named'}), and its "
                "weights cannot be merged.",
                "Convert the unquantised checkpoint that it was made from, then quantise the result.",
            )


def stock_config(model_type: str, text_config: dict[str, Any]) -> Any:
    """The stock config object of a language model: every default filled in, every per-layer list made.

    It is cached and shared: never change it.

    Raises:
        HeadwiseError: a field has the wrong type, or the stock class does not accept the config.
    """
    for name in SIZES:
        value = text_config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise HeadwiseError(
                f"config.json has {name}: {json.dumps(value)}, and a positive whole number is needed."
            )
    if (text_config.get("num_hidden_layers") or 1) > MAX_LAYERS:
        raise HeadwiseError(
            f"config.json has num_hidden_layers: {text_config['num_hidden_layers']}, more than the {MAX_LAYERS} "
            "that any model has."
        )
    for name in PER_LAYER:
        value = text_config.get(name)
        if isinstance(value, list) and len(value) < (text_config.get("num_hidden_layers") or 0):
            raise HeadwiseError(
                f"config.json has {len(value)} {name}, and num_hidden_layers: {text_config['num_hidden_layers']}."
            )
    if text_config.get("per_layer_config"):
        raise HeadwiseError(
            "config.json has per_layer_config: its layers differ in shape, and no stock class that headwise knows "
            "can hold that."
        )
    return _stock_config(model_type, json.dumps(text_config, sort_keys=True))


@lru_cache(maxsize=64)
def _stock_config(model_type: str, text_config: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: value for name, value in json.loads(text_config).items() if name != "model_type"}
    try:
        return CONFIG_MAPPING[model_type](**fields)
    # The classes raise whatever their arithmetic on a bad value happens to raise.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HeadwiseError(f"the stock {model_type} class refuses config.json: {reason}.") from error


def has_stock_class(model_type: str) -> bool:
    """Whether transformers itself has a class for this type, so that no code from a checkpoint is needed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def both_spellings(
    text_config: dict[str, Any],
    model_type: str,
    old_names: dict[str, str],
    old_scaling: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """The config with RoPE in the words of transformers 5 (`rope_parameters`) and of transformers 4.

    Args:
        text_config: `rope_parameters` is the truth where it exists, otherwise the old words are.
        model_type: whose stock class reads the config.
        old_names: rope parameter -> its top-level key in transformers 4.
        old_scaling: the only keys that transformers 4 lets `rope_scaling` have, where it is strict.

    Returns:
        A new dictionary.
    """
    text = copy.deepcopy(text_config)
    if text.get("rope_parameters"):
        # Transformers 5 would prefer a stale `rope_scaling` to `rope_parameters`.
        text.pop("rope_scaling", None)
    rope = copy.deepcopy(getattr(stock_config(model_type, text), "rope_parameters", None))
    if not rope:
        return text
    text["rope_parameters"] = rope
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            text["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"] or {}
    text |= {old: rope[new] for new, old in old_names.items() if new in rope}
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if set(scaling) <= {"rope_type", "type"} and scaling.get("rope_type", "default") == "default":
        text["rope_scaling"] = None
        return text
    if old_scaling and set(scaling) <= {*old_scaling, "rope_type", "original_max_position_embeddings"}:
        if "original_max_position_embeddings" in scaling:
            text["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        scaling = {"type": scaling["rope_type"], **{k: v for k, v in scaling.items() if k in old_scaling}}
    text["rope_scaling"] = copy.deepcopy(scaling)
    return text
