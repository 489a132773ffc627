"""Parse architectures.yaml, and find the row of a checkpoint."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from headwise.errors import HeadwiseError
from headwise.models.config import both_spellings, has_causal_class, has_stock_class, stores_group_count


@dataclass(frozen=True)
class QkNorm:
    """The RMSNorms on queries and keys.

    Attributes:
        q: module name of the queries' norm.
        k: module name of the keys' norm.
        scope: "head": one head at a time, one weight for all; "all": all heads at once. In a row also a config key
            (key), and the scope for each of its values.
        offset: added to the weight before it multiplies (Gemma: 1).
        when: the config key that switches the norms on, None where they are always there.
    """

    q: str
    k: str
    scope: Any
    offset: float
    when: str | None

    def of(self, stock: Any) -> QkNorm | None:
        """Return the norms of a model, with its scope; None if the model has none.

        Args:
            stock: the stock config object.
        """
        if self.when is not None and not getattr(stock, self.when):
            return None
        if isinstance(self.scope, str):
            return self
        return replace(self, scope=self.scope[getattr(stock, self.scope["key"])])


@dataclass(frozen=True)
class ArchitectureRow:
    """One row of `architectures.yaml`.

    Attributes:
        model_type: of the language model.
        family: heading of the type in lists of supported types.
        auto_class: the transformers class that loads the checkpoint.
        layers: how checkpoints name a decoder layer; the first is what `save_pretrained` writes.
        module: the decoder layer's path inside the stock model.
        attention: the attention module's name inside the decoder layer.
        part: what the attention is: "text", "encoder", "decoder", "cross" or "vision".
        on_text: whether text alone runs the attention; a vision tower or a model of speech needs other inputs.
        cached: whether keys and values are kept from one step to the next; an encoder keeps none.
        states: the argument of a cross-attention module that its keys and values are made from; None: they are made
            from the input of the attention.
        merged: the mask argument of attention that makes keys and values from its input and from `states` with the
            same weights, and attends to both at once; None for other attention.
        linear: {types, conv, recurrent}: the layer types without attention, and the sizes of their states: sums of
            products of numbers and config keys. None where all layers have attention.
        only_layers: {key, listed}: the attention of the layers in that list of the config, or of all others.
        sizes: the config keys of the number of query heads (heads), of their width (head_dim), and of the width of
            what keys and values are made from (inputs).
        projections: tensor names of q, k, v, o, or of qkv and o where they are fused.
        renamed: checkpoint name -> names in the stock model, where transformers renames a tensor or a module as it
            loads, or splits the rows of a tensor.
        fusion: "none"; "qkv_concat": all queries, then all keys, then all values;
            "qkv_per_group_interleaved": per key-value head its queries, its key, its value.
        qkv_bias: true, false, or the config key that holds this flag.
        norms: RMSNorms on queries and keys, or None.
        sinks: name of the attention's tensor with a learned score for each query head, which takes part in its
            softmax and has no value; None where there is none.
        query_gate: whether q has a second half in every head, whose sigmoid multiplies the head's output.
        rotary_layout: "half": planes are rows f and f + rotary_dim/2; "interleaved": rows 2f and 2f + 1.
        rope_flags: config key of a list that is true where a layer has RoPE, or of the one kind of positions of all
            layers, "rope" for RoPE.
        rope_layer_types: the layer types that have RoPE, where only some do.
        num_key_value_heads: config key, None where the stock class has none.
        fixed_groups: why the number of key-value heads cannot change, where it cannot (or saves nothing).
        requires: config key -> {value, reason}: variants of the type that cannot be converted.
        old_rope_names: rope parameter -> top-level config key of transformers 4.
        old_rope_scaling: the keys transformers 4 allows in `rope_scaling`, where it is strict.
        text_key: path of the language model's config inside a wrapper, None at the top level.
        old_text_key: the key of its config in older checkpoints, read where there is no `text_key`.
        wrapper: model type of the whole checkpoint where the language model is only a part.
    """

    model_type: str
    family: str
    auto_class: str
    layers: tuple[str, ...]
    module: str
    attention: str
    part: str
    on_text: bool
    cached: bool
    states: str | None
    merged: str | None
    linear: dict[str, Any] | None
    only_layers: dict[str, Any] | None
    sizes: dict[str, str]
    projections: dict[str, str]
    renamed: dict[str, list[str]]
    fusion: str
    qkv_bias: bool | str
    norms: QkNorm | None
    sinks: str | None
    query_gate: bool
    rotary_layout: str
    rope_flags: str | None
    rope_layer_types: tuple[str, ...] | None
    num_key_value_heads: str | None
    fixed_groups: str | None
    requires: dict[str, dict[str, Any]]
    old_rope_names: dict[str, str]
    old_rope_scaling: tuple[str, ...] | None
    text_key: str | None = None
    old_text_key: str | None = None
    wrapper: str | None = None

    @property
    def is_cross(self) -> bool:
        """Whether keys and values are made from another model's output alone."""
        return self.states is not None and self.merged is None

    def stock_names(self, name: str) -> list[str]:
        """Return the names in the stock attention of a checkpoint tensor; it holds their rows in this order.

        Args:
            name: of the tensor or module, without the attention's own name.
        """
        module, dot, kind = name.partition(".")
        return [f"{new}{dot}{kind}" for new in self.renamed.get(module, [module])]


@dataclass(frozen=True)
class Table:
    """The sections of architectures.yaml."""

    rows: dict[str, ArchitectureRow]
    wrappers: dict[str, dict[str, Any]]
    composites: dict[str, dict[str, Any]]
    latents: dict[str, dict[str, Any]]
    auto_classes: dict[str, str]
    refused: dict[str, str]
    windowed_classes: dict[str, dict[str, Any]]


def parse_table(text: str) -> Table:
    """Parse the text of architectures.yaml.

    Args:
        text: the YAML text.

    Returns:
        The sections of the table.

    Raises:
        ValueError: a row has an unknown key, or lacks one.
    """
    data = yaml.safe_load(text)
    _check_keys("the table", data, {f.name for f in fields(Table)})
    expected = {f.name for f in fields(ArchitectureRow)} - {
        "model_type",
        "text_key",
        "old_text_key",
        "wrapper",
    }
    rows = {}
    for model_type, row in data["rows"].items():
        _check_keys(model_type, row, expected)
        rows[model_type] = ArchitectureRow(model_type=model_type, **_frozen(model_type, row))
    for model_type, whole in data["composites"].items():
        _check_keys(model_type, whole, {"family", "auto_class", "parts"})
        common = {"family": whole["family"], "auto_class": whole["auto_class"], "wrapper": model_type}
        for part in whole["parts"]:
            keys = expected | {"model_type", "text_key"} | part.keys() & {"old_text_key"}
            _check_keys(f"{model_type}, {part.get('part')}", part, keys)
        whole["parts"] = [ArchitectureRow(**_frozen(model_type, part) | common) for part in whole["parts"]]
    for model_type, row in data["latents"].items():
        _check_keys(model_type, row, {"half_split", "requires"})
    for model_type, row in data["wrappers"].items():
        _check_keys(
            model_type,
            row,
            {"family", "auto_class", "layers", "module", "text_key", "text_model_type", "may_be_flat"},
        )
    return Table(**(data | {"rows": rows}))


def _frozen(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row, with tuples for lists and its norms as an object."""
    frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    if frozen["norms"]:
        _check_keys(f"{where}, norms", frozen["norms"], {f.name for f in fields(QkNorm)})
        frozen["norms"] = QkNorm(**frozen["norms"])
    return frozen


def _check_keys(where: str, row: dict[str, Any], expected: set[str]) -> None:
    if set(row) != expected:
        raise ValueError(
            f"{where}: unknown keys {sorted(set(row) - expected)}, missing {sorted(expected - set(row))}"
        )


@lru_cache(maxsize=1)
def load_table() -> Table:
    """Return the table of architectures.yaml, cached."""
    return parse_table(resources.files(__package__).joinpath("architectures.yaml").read_text("utf-8"))


def find_parts(config: dict[str, Any], table: Table) -> list[ArchitectureRow]:
    """Find the rows of a model of several attention stacks; none for another model.

    Args:
        config: the checkpoint's config.json.
        table: the table of architectures.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in table.composites:
        return []
    parts: list[ArchitectureRow] = table.composites[model_type]["parts"]
    return parts


def require_variant(row: ArchitectureRow, stock: Any) -> None:
    """Refuse a variant of a model type that cannot be converted.

    Args:
        row: of the type.
        stock: the stock config object.

    Raises:
        HeadwiseError: a field of the config has another value than the row requires.
    """
    require_values(row.requires, stock, row.model_type)


def require_values(requires: dict[str, dict[str, Any]], stock: Any, model_type: str) -> None:
    """Refuse a variant of a model type by the values of its config.

    Args:
        requires: config key -> {value, reason}.
        stock: the stock config object.
        model_type: for the message.

    Raises:
        HeadwiseError: a field has another value.
    """
    for key, rule in requires.items():
        value = getattr(stock, key, None)
        if value != rule["value"]:
            raise HeadwiseError(
                f"config.json has {key}: {json.dumps(value)}, and headwise cannot convert this variant of "
                f"{model_type}: {rule['reason']}.",
                "Leave the model as it is: its weights need this value. An engine can store its cache in 8 bits.",
            )


def find_row(config: dict[str, Any], table: Table) -> ArchitectureRow:
    """Find the row of a config's model type.

    Args:
        config: the checkpoint's config.json.
        table: the table of architectures.

    Returns:
        The row; for a multimodal wrapper, the row of its language model with the wrapper's names.

    Raises:
        HeadwiseError: the config is malformed, or its model type has no row.
    """
    if not isinstance(config, dict):
        raise HeadwiseError(f"config.json holds a {type(config).__name__}, and a config is a JSON object.")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise HeadwiseError(
            f"config.json has model_type: {json.dumps(model_type)}, and a name is needed.",
            'Add the model\'s type, such as "llama".',
        )
    if model_type in table.rows:
        return table.rows[model_type]
    if model_type not in table.wrappers:
        raise _unsupported(model_type, table, config)
    wrapper = table.wrappers[model_type]
    text_key = wrapper["text_key"]
    if text_key not in config and wrapper["may_be_flat"]:
        text_key, inner = None, wrapper["text_model_type"]
    elif isinstance(config.get(text_key), dict | None):
        inner = (config.get(text_key) or {}).get("model_type", wrapper["text_model_type"])
    else:
        raise HeadwiseError(
            f"config.json has {text_key}: {json.dumps(config.get(text_key))}, and the config of the language "
            "model belongs there."
        )
    if not isinstance(inner, str) or inner not in table.rows:
        raise _unsupported(inner, table, (config.get(text_key) or {}) if text_key else config)
    return replace(
        table.rows[inner],
        family=wrapper["family"],
        auto_class=wrapper["auto_class"],
        layers=tuple(wrapper["layers"]),
        module=wrapper["module"],
        text_key=text_key,
        wrapper=model_type,
    )


def _is_no_language_model(model_type: Any, name: Any) -> bool:
    """Return whether the class of a checkpoint shows that it is no causal language model."""
    if not isinstance(name, str) or name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return False
    # A base class has no head in its name: the model type decides, and an unknown one may be misspelt.
    return not name.endswith("Model") or (
        has_stock_class(str(model_type)) and not has_causal_class(str(model_type))
    )


def why_no_decoder(config: dict[str, Any]) -> str | None:
    """Return why a checkpoint is no decoder-only language model, such as "ViTModel is no language model".

    Args:
        config: config.json.

    Returns:
        The end of a sentence; None for a language model, or if the config does not show it.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if config.get("is_encoder_decoder") is True:
        return f"{name or 'it'} is an encoder-decoder model"
    return f"{name} is no language model" if _is_no_language_model(config.get("model_type"), name) else None


def supported_types() -> dict[str, list[str]]:
    """Return the supported model types by family, each list sorted, in the order of the table."""
    table = load_table()
    families: dict[str, list[str]] = {}
    for model_type, row in table.rows.items():
        families.setdefault(row.family, []).append(model_type)
    for model_type, whole in (table.wrappers | table.composites).items():
        families.setdefault(whole["family"], []).append(model_type)
    families["models with MLA (to a smaller cache)"] = list(table.latents)
    return {family: sorted(types) for family, types in families.items()}


def require_decoder(source: str, config: dict[str, Any], purpose: str) -> None:
    """Refuse a model that is no decoder-only language model, such as an encoder-decoder, from its config alone.

    Args:
        source: the user's name of the model.
        config: its config.json.
        purpose: what cannot be done with it, as in "cannot be evaluated".

    Raises:
        HeadwiseError: it is another model.
    """
    if reason := why_no_decoder(config):
        raise HeadwiseError(
            f"{source} cannot be {purpose}: {reason}.",
            "That works for decoder-only language models, alone or inside a multimodal model.",
        )


def _unsupported(model_type: Any, table: Table, config: dict[str, Any]) -> HeadwiseError:
    known = sorted([*table.rows, *table.wrappers, *table.composites, *table.latents])
    listed = "`headwise inspect --types` lists the supported types."
    start = f"headwise cannot convert model type {model_type}"
    reason = why_no_decoder(config)
    has_cache = config.get("is_encoder_decoder") is True or (has_causal_class(str(model_type)) and not reason)
    in_8_bits = "An engine can store its cache in 8 bits, which leaves the checkpoint as it is."
    if isinstance(model_type, str) and model_type in table.refused:
        instead = in_8_bits if has_cache else "Choose another model."
        return HeadwiseError(f"{start}: {table.refused[model_type].strip()}.", f"{instead} {listed}")
    if isinstance(model_type, str) and model_type in table.latents:
        return HeadwiseError(f"config.json: a {model_type} model has MLA already, and no heads.", listed)
    if isinstance(model_type, str) and has_stock_class(model_type) and not stores_group_count(model_type):
        instead = in_8_bits if has_cache else "It has no KV cache; quantised weights make it smaller."
        return HeadwiseError(
            f"{start}: its stock class stores no number of KV heads, so that it could load no other number.",
            f"{instead} {listed}",
        )
    if reason:
        return HeadwiseError(f"{start}: {reason}, and it has no row in the table of architectures.", listed)
    near = difflib.get_close_matches(str(model_type), known, n=1)
    # A longer name of the same family is another type, not a misspelt one.
    near = [name for name in near if not str(model_type).startswith((f"{name}-", f"{name}_"))]
    why = (
        "it has no row in the table of architectures"
        if isinstance(model_type, str) and has_stock_class(model_type)
        else "transformers has no class for it, and headwise never runs code that comes with a checkpoint"
    )
    guess = f"Did you mean {near[0]}? " if near else ""
    return HeadwiseError(f"{start}: {why}.", f"{guess}{listed}")


def supported_model_types() -> list[str]:
    """Return every model type that has a row, sorted."""
    table = load_table()
    return sorted([*table.rows, *table.wrappers, *table.composites, *table.latents])


def both_rope_spellings(text_config: dict[str, Any]) -> dict[str, Any]:
    """Return a language-model config whose RoPE fields follow both transformers 5 and transformers 4.

    If the config has `rope_parameters`, then `rope_theta`, `rope_scaling` and the partial rotary factor are
    rewritten from it. Otherwise `rope_parameters` is built from those fields. If `rope_parameters` has an entry per
    layer type (Gemma 3), the full-attention entry gives `rope_theta` and `rope_scaling`. The sliding-attention
    entry gives `rope_local_base_freq`.

    Args:
        text_config: a config with the `model_type` of any stock class, in the table or not.

    Returns:
        A new dictionary.
    """
    table = load_table()
    model_type = str(text_config.get("model_type"))
    model_type = table.wrappers.get(model_type, {}).get("text_model_type", model_type)
    row = table.rows.get(model_type, table.rows["llama"])
    return both_spellings(text_config, model_type, row.old_rope_names, row.old_rope_scaling)
