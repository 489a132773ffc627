"""Build the stock config object of a config.json, with checks that transformers lacks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch

from headwise.errors import HeadwiseError
from headwise.models.layout import LINEAR, AttentionLayout

# A hostile layer count would make the stock config class build a list of that length.
# The others bound the search for what a model can become, and the tables of its frequencies.
MAX_LAYERS, MAX_SIZE, MAX_HEAD_DIM, MAX_LABELS = 10_000, 1_000_000, 8192, 10_000
MOST = {
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_SIZE,
    "num_key_value_heads": MAX_SIZE,
    "hidden_size": MAX_SIZE,
    "head_dim": MAX_HEAD_DIM,
    "max_position_embeddings": 1 << 40,
}
# Tables of a classification head, which no converted model has; every stock config object holds them.
LABEL_TABLES = ("id2label", "label2id")
SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "hidden_size",
    "head_dim",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
)
# What must be a number above zero in rope_parameters, and what each type cannot do without.
ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
)
ROPE_LISTS = ("short_factor", "long_factor")
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (*ROPE_LISTS, "original_max_position_embeddings"),
}
# Ends of the names by which stock configs count KV heads.
GROUP_COUNTS = ("num_key_value_heads", "num_kv_heads", "multi_query", "multi_query_group_num")
# The names of the number of experts of a layer, and of those that a router selects for a token.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SELECTED_EXPERTS = "num_experts_per_tok"
# In the name of a tensor of experts that a router selects from; those that every token runs are "shared".
ROUTED = ".experts."
PER_LAYER = ("layer_types", "no_rope_layers")
# By these a config chooses code; what is converted runs with the stock class, however that likes to.
CODE_KEYS = ("auto_map", *(f"{dash}{kind}_implementation" for dash in ("", "_") for kind in ("attn", "experts")))


def stock_text_config(model_type: str, text_config: dict[str, Any]) -> Any:
    """Return the stock config object of a language model, with all defaults and per-layer lists filled in.

    The object is cached and shared, so callers must not change it.

    Args:
        model_type: the model type of the language model.
        text_config: the config of the language model.

    Raises:
        HeadwiseError: a field has the wrong type, or the stock class does not accept the config.
    """
    for name in SIZES:
        value = text_config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise HeadwiseError(
                f"config.json has {name}: {json.dumps(value)}, and a positive whole number is needed."
            )
    for name in MOST:
        if isinstance(value := text_config.get(name), int):
            _refuse_enormous(name, value)
    check_labels(text_config)
    for name in ("dtype", "torch_dtype"):
        value = text_config.get(name)
        if value is not None and value != "auto" and named_dtype(value) is None:
            raise HeadwiseError(f"config.json has {name}: {value!r}, which is not a dtype.")
    for name in PER_LAYER:
        value = text_config.get(name)
        if isinstance(value, list) and len(value) < (text_config.get("num_hidden_layers") or 0):
            raise HeadwiseError(
                f"config.json has {len(value)} {name}, and num_hidden_layers: {text_config['num_hidden_layers']}."
            )
    if text_config.get("per_layer_config"):
        raise HeadwiseError(
            "config.json has per_layer_config: its layers differ in shape, and the stock classes that headwise "
            "converts read one shape for all layers."
        )
    stock = _stock_config(model_type, json.dumps(text_config, sort_keys=True))
    _check_experts(stock, text_config)
    return stock


def _check_experts(stock: Any, named: Collection[str]) -> None:
    """Refuse a router that selects more experts than a layer has. One expert or none means a dense model.

    Args:
        stock: the stock config object, which may know the number of experts by several names.
        named: the fields of config.json.
    """
    experts = [(value, name in named, name) for name, value in _expert_counts(stock).items()]
    selected = getattr(stock, SELECTED_EXPERTS, None)
    most, _, name = max(experts, default=(0, False, ""))
    if isinstance(selected, int) and selected > most > 1:
        raise HeadwiseError(
            f"config.json has {SELECTED_EXPERTS}: {selected}, and {name}: {most}: a router cannot select more "
            "experts than a layer has.",
            f"Give {SELECTED_EXPERTS} the number that the model was trained with.",
        )


def _expert_counts(stock: Any) -> dict[str, int]:
    """Return the number of experts of a layer by every name that a stock config has for it."""
    counts = {name: getattr(stock, name, None) for name in EXPERT_COUNTS}
    return {name: value for name, value in counts.items() if isinstance(value, int)}


def selected_share(stock: Any) -> float:
    """Return the share of a layer's routed experts that one token runs; 1 for a dense model.

    Args:
        stock: the stock config object of the language model.
    """
    count, selected = max(_expert_counts(stock).values(), default=0), getattr(stock, SELECTED_EXPERTS, None)
    return selected / count if isinstance(selected, int) and 0 < selected < count else 1.0


def is_routed(name: str, shape: Sequence[int], stock: Any) -> bool:
    """Return whether a tensor belongs to experts that a router selects from: to one, or to all of a layer.

    Args:
        name: of the tensor, in a checkpoint or in the stock class.
        shape: of the tensor. One that stacks matrices of all experts has their number first, under any name.
        stock: the stock config object of the language model.
    """
    stacked = len(shape) == 3 and shape[1] > 1 and shape[0] > 1 and shape[0] in _expert_counts(stock).values()
    return ROUTED in name or stacked


def check_labels(config: dict[str, Any], most: int = MAX_LABELS) -> None:
    """Refuse more labels of a classification head than a model can have: the stock class builds a table of them.

    Args:
        config: the config.json, or its text config.
        most: the largest number. Where headers are known, no label is without a row in some tensor.

    Raises:
        HeadwiseError: there are more.
    """
    most = min(most, MAX_LABELS)
    for name in ("num_labels", *LABEL_TABLES):
        value = config.get(name)
        count = len(value) if isinstance(value, dict | list) else value
        if isinstance(count, int | float) and count > most:
            raise HeadwiseError(
                f"config.json has {name} for {count} labels, and the most is {most:,}.",
                "Remove `num_labels`, `id2label` and `label2id`: a language model has no classification head.",
            )


def named_dtype(name: Any) -> torch.dtype | None:
    """Return the dtype of a name such as "bfloat16" or "torch.bfloat16", or None if it names no dtype.

    Args:
        name: the value of a config field.
    """
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def with_special_floats(text: str) -> Any:
    """Return what JSON text holds, with the floats that JSON has no numbers for, as transformers writes them.

    Args:
        text: JSON; `{"__float__": "Infinity"}` stands for such a float.
    """
    return json.loads(text, object_hook=_special_float)


def _special_float(entries: dict[str, Any]) -> Any:
    special = len(entries) == 1 and entries.get("__float__") in ("Infinity", "-Infinity", "NaN")
    return float(entries["__float__"]) if special else entries


@lru_cache(maxsize=64)
def _stock_config(model_type: str, text_config: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: value for name, value in with_special_floats(text_config).items() if name != "model_type"}
    try:
        stock = CONFIG_MAPPING[model_type](**fields)
        stock.to_dict()  # what the class took without a look may fail here
        return stock
    # The classes raise whatever their arithmetic on a bad value happens to raise.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise HeadwiseError(
            f"the stock {model_type} class refuses config.json: {reason}.",
            "Correct the field in config.json, or download it again.",
        ) from error


def check_rope(rope_parameters: Any) -> None:
    """Refuse rotary parameters that give no valid frequencies.

    Args:
        rope_parameters: of a stock config; one dictionary for all layers, or one for each type of layer.

    Raises:
        HeadwiseError: a parameter is missing, has the wrong type, or is not positive.
    """
    if rope_parameters is None:
        return
    if not isinstance(rope_parameters, dict):
        raise _bad_rope("", rope_parameters)
    nested = {key: value for key, value in rope_parameters.items() if isinstance(value, dict)}
    for own in nested.values() if nested else [rope_parameters]:
        kind = own.get("rope_type") or own.get("type") or "default"
        if not isinstance(kind, str):
            raise _bad_rope("rope_type", kind)
        for name in ("rope_theta", *ROPE_NEEDS.get(kind, ())):
            if own.get(name) is None:
                raise _bad_rope(name, None)
        for name in ROPE_NUMBERS:
            if own.get(name) is not None and not _is_scale(own[name]):
                raise _bad_rope(name, own[name])
        for name in ROPE_LISTS:
            value = own.get(name)
            if value is not None and not (isinstance(value, list) and value and all(map(_is_scale, value))):
                raise _bad_rope(name, value)


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _bad_rope(name: str, value: Any) -> HeadwiseError:
    where = f"rope_parameters.{name}" if name else "rope_parameters"
    return HeadwiseError(f"config.json has {where}: {value!r}, from which no frequencies can be computed.")


def checked_size(config: dict[str, Any], name: str) -> int:
    """Return a count or a width from a config that no stock class has checked.

    Args:
        config: the config.json.
        name: key of the count or width.

    Raises:
        HeadwiseError: the value is missing, is not a whole number, or is out of range.
    """
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SIZE:
        raise HeadwiseError(f"config.json has {name}: {value!r}, and a whole number is needed.")
    return value


def positive_size(stock: Any, field: str) -> int:
    """Return a count or a width from a stock config object.

    Args:
        stock: the stock config object.
        field: name of the attribute.

    Raises:
        HeadwiseError: the value is missing, is not a positive whole number, or is too large.
    """
    value = getattr(stock, field, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HeadwiseError(f"config.json has {field}: {value!r}, and a positive whole number is needed.")
    _refuse_enormous(field, value)
    return value


def rotary_width(rope_parameters: dict[str, Any] | None, head_dim: int) -> int:
    """Return the number of rotary dimensions of a head.

    Args:
        rope_parameters: of a stock config; None if the model has no RoPE parameters.
        head_dim: width of a head.

    Raises:
        HeadwiseError: the parameters give no frequencies, or the rotary width is not an even number.
    """
    check_rope(rope_parameters)
    _refuse_enormous("head_dim", head_dim)
    factor = (rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if not _is_scale(factor) or factor > 1 or int(head_dim * factor) % 2:
        raise HeadwiseError(
            f"config.json has partial_rotary_factor: {factor!r} with head_dim: {head_dim}, and the rotary part "
            "of a head must be an even number of dimensions."
        )
    return int(head_dim * factor)


def _refuse_enormous(name: str, value: int) -> None:
    if value > MOST.get(name, value):
        raise HeadwiseError(f"config.json has {name}: {value}, more than the {MOST[name]:,} that any model has.")


def has_stock_class(model_type: str) -> bool:
    """Return whether transformers has a class for this model type, so that no code from a checkpoint is needed.

    Args:
        model_type: the `model_type` of a config.json.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def has_causal_class(model_type: str) -> bool:
    """Return whether transformers has a causal language model of this model type.

    Args:
        model_type: the `model_type` of a config.json.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return has_stock_class(model_type) and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def stores_group_count(model_type: str) -> bool:
    """Return whether the stock config of a type, or of a part of it, has a number of KV heads.

    Args:
        model_type: a type of transformers.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        fields = CONFIG_MAPPING[model_type]().to_dict()
    except Exception:  # some configs need the configs of their parts, whatever the class then raises
        return True
    parts = [fields, *(value for value in fields.values() if isinstance(value, dict))]
    parts += [value for part in parts[1:] for value in part.values() if isinstance(value, dict)]
    return any(str(name).endswith(GROUP_COUNTS) for part in parts for name in part)


def complete_part(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the config of a part of a model, such as its language model; the same dictionary, not a copy.

    Args:
        config: the config.json. A part that it leaves out, or has as null, is filled in by the stock class.
        key: path of the part, such as "encoder.text_config".

    Raises:
        HeadwiseError: the config has something else in the place of the part.
    """
    inner, plain = config, {name: value for name, value in config.items() if value is not None}
    names = key.split(".")
    for depth, name in enumerate(names, 1):
        if inner.get(name) is None:
            whole = whole_part(plain, ".".join(names[:depth]))
            inner[name] = json.loads(whole.to_json_string(use_diff=False))
        inner = inner[name]
        if not isinstance(inner, dict):
            raise HeadwiseError(
                f"config.json has {key}: {json.dumps(inner)}, and the config of a part belongs there."
            )
        if not isinstance(model_type := inner.get("model_type"), str | None):
            raise HeadwiseError(
                f"config.json has model_type: {json.dumps(model_type)} in {name}, and a name is needed."
            )
    return inner


def whole_part(config: dict[str, Any], key: str) -> Any:
    """Return the stock config object of a part, as the stock config of the whole model makes it.

    Args:
        config: the config.json.
        key: path of the part, as in `complete_part`.
    """
    return attrgetter(key)(_stock_config(config["model_type"], json.dumps(config, sort_keys=True)))


def both_spellings(
    text_config: dict[str, Any],
    model_type: str,
    old_names: dict[str, str],
    old_scaling: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Return the config with RoPE fields for transformers 5 (`rope_parameters`) and for transformers 4.

    Args:
        text_config: the config of the language model. Its `rope_parameters` take precedence over the old fields.
        model_type: the model type whose stock class reads the config.
        old_names: rope parameter -> its top-level key in transformers 4.
        old_scaling: the only keys that transformers 4 allows in `rope_scaling`, or None if it allows any key.

    Returns:
        A new dictionary.
    """
    text = copy.deepcopy(text_config)
    if text.get("rope_parameters"):
        # Transformers 5 would prefer a stale `rope_scaling` to `rope_parameters`.
        text.pop("rope_scaling", None)
    rope = copy.deepcopy(getattr(stock_text_config(model_type, text), "rope_parameters", None))
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


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype that a config names in `dtype` or `torch_dtype`; float32 if it names none.

    Args:
        config: the config.json.
    """
    return stored_dtype(config) or torch.float32


def stored_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype that a config names in `dtype` or `torch_dtype`, or None if it names none.

    Args:
        config: the config.json.
    """
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    dtypes = (named_dtype(part.get("dtype") or part.get("torch_dtype")) for part in parts)
    return next((dtype for dtype in dtypes if dtype is not None), None)


def with_linear_layers(
    layouts: Sequence[AttentionLayout], layer_types: Sequence[Any], stock: Any, linear: dict[str, Any]
) -> list[AttentionLayout]:
    """Return the layouts of a hybrid model, from those that it would have with attention in every layer.

    Args:
        layouts: of every layer.
        layer_types: of every layer, by the stock config.
        stock: the stock config object.
        linear: the `linear` of the architecture row.

    Raises:
        HeadwiseError: no layer has attention, or a size of the config is not a number.
    """
    conv, recurrent = (
        sum(math.prod(positive_size(stock, n) if isinstance(n, str) else n for n in term) for term in linear[name])
        for name in ("conv", "recurrent")
    )
    hybrid = [
        replace(layout, part=LINEAR, cached=False, rotary_dim=0, conv_state=conv, recurrent_state=recurrent)
        if layer_type in linear["types"]
        else layout
        for layout, layer_type in zip(layouts, layer_types, strict=False)
    ]
    if not any(layout.attends for layout in hybrid):
        raise HeadwiseError("config.json has layer_types without attention, and no layer has a KV cache.")
    return hybrid
