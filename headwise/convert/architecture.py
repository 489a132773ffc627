"""Checkpoint names, fusions and config keys of each model type <-> `AttentionLayout` and `LayerWeights`.

A model type is a row of `architectures.yaml`; no code here knows a model type by name. What a config leaves out
(default head counts, sliding patterns, the partial rotary factor) is asked of the stock config class, so that
there is no second set of defaults to go stale.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
import yaml
from torch import Tensor

from headwise.convert.layout import AttentionLayout, LayerWeights
from headwise.errors import HeadwiseError

# A hostile layer count would make the stock config class build a list of that length.
MAX_LAYERS = 10_000
QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")


@dataclass(frozen=True)
class QkNorm:
    """The RMSNorms on queries and keys.

    Attributes:
        q: module name of the queries' norm.
        k: module name of the keys' norm.
        scope: "head": one head at a time, one weight for all; "all": all heads at once.
        offset: added to the weight before it multiplies (Gemma: 1).
        when: the config key that switches the norms on, None where they are always there.
    """

    q: str
    k: str
    scope: str
    offset: float
    when: str | None


@dataclass(frozen=True)
class Architecture:
    """One row of `architectures.yaml`.

    Attributes:
        model_type: of the language model.
        auto_class: the transformers class that loads the checkpoint.
        layers: how checkpoints name a decoder layer; the first is what `save_pretrained` writes.
        module: the decoder layer's path inside the stock model.
        attention: the attention module's name inside the decoder layer.
        projections: tensor names of q, k, v, o, or of qkv and o where they are fused.
        fusion: "none"; "qkv_concat": all queries, then all keys, then all values;
            "qkv_per_group_interleaved": per key-value head its queries, its key, its value.
        qkv_bias: true, false, or the config key that says so.
        norms: RMSNorms on queries and keys, or None.
        rotary_layout: "half": planes are rows f and f + rotary_dim/2; "interleaved": rows 2f and 2f + 1.
        rope_flags: config key of a list that is true where a layer has RoPE.
        rope_layer_types: the layer types that have RoPE, where only some do.
        num_key_value_heads: config key, None where the stock class has none.
        fixed_groups: why the number of key-value heads cannot change, where it cannot.
        requires: config key -> {value, reason}: variants of the type that cannot be converted.
        old_rope_names: rope parameter -> top-level config key of transformers 4.
        old_rope_scaling: the keys transformers 4 allows in `rope_scaling`, where it is strict.
        text_key: config key of the language model inside a wrapper, None at the top level.
        wrapper: model type of the whole checkpoint where the language model is only a part.
    """

    model_type: str
    auto_class: str
    layers: tuple[str, ...]
    module: str
    attention: str
    projections: dict[str, str]
    fusion: str
    qkv_bias: bool | str
    norms: QkNorm | None
    rotary_layout: str
    rope_flags: str | None
    rope_layer_types: tuple[str, ...] | None
    num_key_value_heads: str | None
    fixed_groups: str | None
    requires: dict[str, dict[str, Any]]
    old_rope_names: dict[str, str]
    old_rope_scaling: tuple[str, ...] | None
    text_key: str | None = None
    wrapper: str | None = None

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The part of `config` that describes the language model; the same dictionary, not a copy."""
        return config[self.text_key] if self.text_key else config

    def layouts(self, config: dict[str, Any]) -> list[AttentionLayout]:
        """The layout of every layer.

        Raises:
            HeadwiseError: a field of the config has the wrong type or an impossible value.
        """
        return list(_layouts(self.model_type, _key(self.text_config(config))))

    def legal_groups(self, config: dict[str, Any]) -> list[int]:
        """Numbers of key-value heads the stock class can hold, ascending."""
        layout = self.layouts(config)[0]
        if self.num_key_value_heads is None:
            return [layout.num_key_value_heads]
        return [g for g in range(1, layout.num_attention_heads + 1) if layout.num_attention_heads % g == 0]

    def has_bias(self, config: dict[str, Any]) -> bool:
        """Whether queries, keys and values have biases."""
        if isinstance(self.qkv_bias, str):
            return bool(getattr(self._stock(config), self.qkv_bias))
        return self.qkv_bias

    def tensor_shapes(self, config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every checkpoint tensor that holds this layer's attention.

        The output bias is not among them: no conversion touches it.
        """
        layout = self.layouts(config)[layer]
        norms = self._norms(config)
        width = self._stock(config).hidden_size
        heads, groups = layout.num_attention_heads, layout.num_key_value_heads
        sizes = {"q": heads * layout.head_dim, "k": groups * layout.head_dim, "v": groups * layout.v_head_dim}
        sizes["qkv"] = sum(sizes.values())
        shapes: dict[str, tuple[int, ...]] = {}
        for part, name in self.projections.items():
            if part == "o":
                continue
            shapes[self._name(layer, name, "weight")] = (sizes[part], width)
            if self.has_bias(config):
                shapes[self._name(layer, name, "bias")] = (sizes[part],)
        if norms:
            for part, name in (("q", norms.q), ("k", norms.k)):
                size = sizes[part] if norms.scope == "all" else layout.head_dim
                shapes[self._name(layer, name, "weight")] = (size,)
        shapes[self._name(layer, self.projections["o"], "weight")] = (width, heads * layout.v_head_dim)
        return shapes

    def tensor_names(self, config: dict[str, Any], layer: int) -> tuple[str, ...]:
        """The checkpoint tensors that hold this layer's attention: those that a conversion rewrites."""
        return tuple(self.tensor_shapes(config, layer))

    def read_layer(self, config: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> LayerWeights:
        """One layer's attention in float64.

        Args:
            config: the checkpoint's config.json.
            layer: index of the decoder layer.
            tensors: at least those of `tensor_names`, in any floating dtype.

        Raises:
            HeadwiseError: a tensor is missing or has another shape than the config promises.
        """
        for name, shape in self.tensor_shapes(config, layer).items():
            if name not in tensors:
                raise HeadwiseError(
                    f"tensor {name} is missing; config.json promises one of shape {shape}.",
                    "The checkpoint and its config.json do not belong together, or a shard is incomplete.",
                )
            if tuple(tensors[name].shape) != shape:
                raise HeadwiseError(
                    f"tensor {name} has shape {tuple(tensors[name].shape)}, and config.json promises {shape}.",
                    "The checkpoint and its config.json do not belong together.",
                )
        layout = self.layouts(config)[layer]
        parts = {
            part: self._read_projection(layer, name, tensors, self.has_bias(config))
            for part, name in self.projections.items()
            if part != "o"
        }
        q, k, v = _split(self.fusion, parts, layout)
        order = _half_split_order(layout, self.rotary_layout)
        o = tensors[self._name(layer, self.projections["o"], "weight")].to(torch.float64)
        weights = LayerWeights(
            layout=layout,
            q=q[:, order],
            k=k[:, order],
            v=v,
            o=o.unflatten(1, (layout.num_attention_heads, layout.v_head_dim)).transpose(0, 1).contiguous(),
        )
        norms = self._norms(config)
        if not norms:
            return weights

        def multiplier(name: str, heads: int) -> Tensor:
            weight = tensors[self._name(layer, name, "weight")].to(torch.float64) + norms.offset
            return weight.expand(heads, -1) if norms.scope == "head" else weight.unflatten(0, (heads, -1))

        return replace(
            weights,
            q_norm=multiplier(norms.q, layout.num_attention_heads)[:, order],
            k_norm=multiplier(norms.k, layout.num_key_value_heads)[:, order],
            norm_scope=norms.scope,
        )

    def write_layer(
        self, config: dict[str, Any], layer: int, weights: LayerWeights, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The inverse of `read_layer`: checkpoint tensors of one layer.

        Args:
            config: the source's config.json; the number of key-value heads is taken from `weights.layout`.
            layer: index of the decoder layer.
            weights: the layer, converted or not.
            dtype: of the tensors returned; rounding happens here and nowhere else.

        Raises:
            ValueError: the stock class has no room for these weights: a bias where it has none, or norm
                weights that differ between heads where it shares them.
        """
        layout = weights.layout
        order = torch.argsort(_half_split_order(layout, self.rotary_layout))
        biased = self.has_bias(config)
        rows = {
            part: _fit_bias(tensor, weights.hidden_size, biased)
            for part, tensor in (("q", weights.q[:, order]), ("k", weights.k[:, order]), ("v", weights.v))
        }
        out: dict[str, Tensor] = {}
        for part, matrix in _fuse(self.fusion, rows, layout).items():
            name = self.projections[part]
            out[self._name(layer, name, "weight")] = matrix[:, : weights.hidden_size]
            if biased:
                out[self._name(layer, name, "bias")] = matrix[:, -1]
        norms = self._norms(config)
        if norms:
            for name, norm in ((norms.q, weights.q_norm), (norms.k, weights.k_norm)):
                if norm is None:
                    raise ValueError(f"layer {layer} has norms on queries and keys, and the weights have none")
                if norms.scope == "head" and not torch.equal(norm, norm[:1].expand_as(norm)):
                    raise ValueError(f"layer {layer}: heads share the weight of {name}, and these differ")
                shared = norm[:1] if norms.scope == "head" else norm
                out[self._name(layer, name, "weight")] = (shared[:, order] - norms.offset).flatten()
        out[self._name(layer, self.projections["o"], "weight")] = weights.o.transpose(0, 1).flatten(1)
        return {name: tensor.to(dtype).contiguous() for name, tensor in out.items()}

    def with_groups(self, config: dict[str, Any], num_key_value_heads: int) -> dict[str, Any]:
        """A new config with this many key-value heads, readable by transformers 4 and 5.

        Raises:
            HeadwiseError: the stock class cannot hold that number.
        """
        legal = self.legal_groups(config)
        if num_key_value_heads not in legal:
            heads = self.layouts(config)[0].num_attention_heads
            why = self.fixed_groups or f"{heads} query heads cannot share them equally"
            raise HeadwiseError(
                f"{self.wrapper or self.model_type} with {heads} query heads cannot have {num_key_value_heads} "
                f"key-value heads: {why}.",
                f"Legal: {', '.join(map(str, legal))}.",
            )
        new = copy.deepcopy(config)
        text = self.text_config(new)
        stock = self._stock(config)
        if self.num_key_value_heads:
            text["num_attention_heads"] = stock.num_attention_heads
            text[self.num_key_value_heads] = num_key_value_heads
        if isinstance(getattr(stock, "head_dim", None), int):
            text["head_dim"] = stock.head_dim
        if stock.rope_parameters:
            text["rope_parameters"] = copy.deepcopy(stock.rope_parameters)
        spelled = both_rope_spellings({"model_type": self.model_type, **text})
        text.update(spelled)
        for part in (new, text):
            dtype = part.get("dtype", part.get("torch_dtype"))
            if dtype is not None:
                part["dtype"] = part["torch_dtype"] = dtype
            for key in ("auto_map", *QUANTIZATION_KEYS):
                part.pop(key, None)
        return new

    def _name(self, layer: int, name: str, kind: str) -> str:
        return f"{self.layers[0].format(layer=layer)}.{self.attention}.{name}.{kind}"

    def _read_projection(self, layer: int, name: str, tensors: dict[str, Tensor], biased: bool) -> Tensor:
        """(rows, inputs), the bias as the last column."""
        weight = tensors[self._name(layer, name, "weight")].to(torch.float64)
        if not biased:
            return weight
        bias = tensors[self._name(layer, name, "bias")].to(torch.float64)
        return torch.cat([weight, bias[:, None]], dim=1)

    def _stock(self, config: dict[str, Any]) -> Any:
        return _stock(self.model_type, _key(self.text_config(config)))

    def _norms(self, config: dict[str, Any]) -> QkNorm | None:
        norms = self.norms
        return norms if norms and (norms.when is None or getattr(self._stock(config), norms.when)) else None


def find(config: dict[str, Any], names: Iterable[str] = ()) -> Architecture:
    """The row for a checkpoint.

    Args:
        config: the checkpoint's config.json.
        names: its tensor names. They decide where a type's checkpoints come under more than one naming;
            without them the naming that `save_pretrained` writes is assumed.

    Raises:
        HeadwiseError: the model type is unknown or refused, the checkpoint is quantised, or the config is not
            one that the stock class accepts.
    """
    table = _table()
    arch = _find_row(config, table)
    text = arch.text_config(config)
    for part in (config, text):
        _refuse_quantised(part)
    stock = _stock(arch.model_type, _key(text))
    for key, rule in arch.requires.items():
        value = getattr(stock, key, None)
        if value != rule["value"]:
            raise HeadwiseError(
                f"config.json has {key}: {json.dumps(value)}, and headwise cannot convert this variant of "
                f"{arch.model_type}: {rule['reason']}."
            )
    arch.layouts(config)
    present = set(names)
    for prefix in arch.layers:
        candidate = replace(arch, layers=(prefix,))
        if present and any(name in present for name in candidate.tensor_names(config, 0)):
            return candidate
    return arch


def supported() -> list[str]:
    """Every model type that has a row, sorted."""
    table = _table()
    return sorted([*table.rows, *table.wrappers])


def both_rope_spellings(text_config: dict[str, Any]) -> dict[str, Any]:
    """The same language-model config with RoPE in the words of transformers 5 and of transformers 4.

    `rope_parameters` is the truth where it exists; `rope_theta`, `rope_scaling` and the partial rotary factor
    are then rewritten from it. Otherwise it is made from them. A `rope_parameters` per layer type (Gemma 3)
    becomes `rope_theta` and `rope_scaling` of the full-attention layers and `rope_local_base_freq` of the
    sliding ones.

    Args:
        text_config: with its `model_type`.

    Returns:
        A new dictionary.
    """
    text = copy.deepcopy(text_config)
    row = _table().rows.get(str(text.get("model_type")))
    names = row.old_rope_names if row else {"rope_theta": "rope_theta"}
    rope = text.get("rope_parameters")
    if not rope:
        rope = dict(text.get("rope_scaling") or {})
        rope.setdefault("rope_type", rope.get("type", "default"))
        for new, old in names.items():
            if old in text:
                rope.setdefault(new, text[old])
        text["rope_parameters"] = copy.deepcopy(rope)
    if isinstance(rope.get("full_attention"), dict):
        local = rope.get("sliding_attention") or {}
        if "rope_theta" in local:
            text["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    for new, old in names.items():
        if new in rope:
            text[old] = rope[new]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if row and row.old_rope_scaling:
        scaling.setdefault("type", scaling.get("rope_type", "default"))
        plain = scaling["type"] == "default"
        scaling = {} if plain else {k: scaling[k] for k in row.old_rope_scaling if k in scaling}
    plain = set(scaling) <= {"rope_type", "type"} and scaling.get("rope_type", "default") == "default"
    text["rope_scaling"] = None if plain else scaling
    return text


@dataclass(frozen=True)
class _Table:
    rows: dict[str, Architecture]
    wrappers: dict[str, dict[str, Any]]
    refused: dict[str, str]


def parse_table(text: str) -> _Table:
    """Read the table.

    Raises:
        ValueError: a row has an unknown key, or lacks one.
    """
    data = yaml.safe_load(text)
    unknown = set(data) - {"rows", "wrappers", "refused"}
    if unknown:
        raise ValueError(f"unknown sections: {sorted(unknown)}")
    rows = {}
    for model_type, row in data["rows"].items():
        _check_keys(model_type, row, {f.name for f in fields(Architecture)} - {"model_type", "text_key", "wrapper"})
        frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        if frozen["norms"]:
            frozen["norms"] = QkNorm(**frozen["norms"])
        rows[model_type] = Architecture(model_type=model_type, **frozen)
    for model_type, row in data["wrappers"].items():
        _check_keys(model_type, row, {"auto_class", "layers", "module", "text_key", "text_model_type"})
    return _Table(rows, data["wrappers"], data["refused"])


def _check_keys(model_type: str, row: dict[str, Any], expected: set[str]) -> None:
    if set(row) != expected:
        raise ValueError(
            f"row {model_type}: unknown keys {sorted(set(row) - expected)}, missing {sorted(expected - set(row))}"
        )


@lru_cache(maxsize=1)
def _table() -> _Table:
    return parse_table(resources.files(__package__).joinpath("architectures.yaml").read_text("utf-8"))


def _find_row(config: dict[str, Any], table: _Table) -> Architecture:
    if not isinstance(config, dict):
        raise HeadwiseError(f"config.json holds a {type(config).__name__}, and a config is a JSON object.")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise HeadwiseError(
            f"config.json has model_type: {model_type!r}, and a name is needed.",
            'Add the model\'s type, such as "llama".',
        )
    if model_type in table.rows:
        return table.rows[model_type]
    if model_type in table.wrappers:
        wrapper = table.wrappers[model_type]
        text_key = wrapper["text_key"] if isinstance(config.get(wrapper["text_key"]), dict) else None
        inner = (config[text_key] if text_key else {}).get("model_type", wrapper["text_model_type"])
        if inner not in table.rows:
            raise _unsupported(inner, table, f"the language model inside this {model_type}")
        return replace(
            table.rows[inner],
            auto_class=wrapper["auto_class"],
            layers=tuple(wrapper["layers"]),
            module=wrapper["module"],
            text_key=text_key,
            wrapper=model_type,
        )
    raise _unsupported(model_type, table, "this checkpoint")


def _unsupported(model_type: Any, table: _Table, what: str) -> HeadwiseError:
    known = sorted([*table.rows, *table.wrappers])
    if model_type in table.refused:
        return HeadwiseError(f"headwise cannot convert model type {model_type!r}: {table.refused[model_type]}.")
    near = difflib.get_close_matches(str(model_type), known, n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    return HeadwiseError(
        f"headwise does not know the model type {model_type!r} of {what}.",
        f"{guess}Supported: {', '.join(known)}.",
    )


def _refuse_quantised(config: dict[str, Any]) -> None:
    for key in QUANTIZATION_KEYS:
        value = config.get(key)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else None
            raise HeadwiseError(
                f"config.json has {key}: the checkpoint is quantised ({method or 'method not named'}), and its "
                "weights cannot be merged.",
                "Convert the unquantised checkpoint that it was made from, then quantise the result.",
            )


def _key(text: dict[str, Any]) -> str:
    return json.dumps(text, sort_keys=True, default=str)


@lru_cache(maxsize=64)
def _stock(model_type: str, text: str) -> Any:
    """The stock config object of a language model; never to be changed, it is shared.

    Raises:
        HeadwiseError: the stock class does not accept the config.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = json.loads(text)
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"):
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise HeadwiseError(
                f"config.json has {name}: {json.dumps(value)}, and a positive whole number is needed."
            )
    if (config.get("num_hidden_layers") or 1) > MAX_LAYERS:
        raise HeadwiseError(
            f"config.json has num_hidden_layers: {config['num_hidden_layers']}, and more than {MAX_LAYERS} is no "
            "model."
        )
    config.pop("model_type", None)
    try:
        return CONFIG_MAPPING[model_type](**config)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise HeadwiseError(f"the stock {model_type} class refuses config.json: {reason}.") from error


@lru_cache(maxsize=64)
def _layouts(model_type: str, text: str) -> tuple[AttentionLayout, ...]:
    row = _table().rows[model_type]
    stock = _stock(model_type, text)
    layer_types = getattr(stock, "layer_types", None)
    window = getattr(stock, "sliding_window", None)
    heads = stock.num_attention_heads
    groups = getattr(stock, row.num_key_value_heads) if row.num_key_value_heads else heads
    head_dim = getattr(stock, "head_dim", None) or stock.hidden_size // heads
    rope = stock.rope_parameters or {}
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if heads % groups:
        raise HeadwiseError(
            f"config.json has {row.num_key_value_heads}: {groups}, which does not divide "
            f"num_attention_heads: {heads}."
        )
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise HeadwiseError(f"config.json gives {rotary_dim} rotary numbers to a head of {head_dim}.")

    def layout(layer: int) -> AttentionLayout:
        kind = layer_types[layer] if layer_types else None
        rope_here = (not row.rope_flags or bool(getattr(stock, row.rope_flags)[layer])) and (
            not row.rope_layer_types or kind in row.rope_layer_types
        )
        return AttentionLayout(
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            v_head_dim=head_dim,
            rotary_dim=rotary_dim if rope_here else 0,
            sliding_window=window if not layer_types or kind == "sliding_attention" else None,
        )

    return tuple(layout(layer) for layer in range(stock.num_hidden_layers))


def _half_split_order(layout: AttentionLayout, rotary_layout: str) -> Tensor:
    """The source row of each row of `LayerWeights`."""
    order = torch.arange(layout.head_dim)
    if rotary_layout == "interleaved":
        rotary = order[: layout.rotary_dim]
        order = torch.cat([rotary[0::2], rotary[1::2], order[layout.rotary_dim :]])
    return order


def _split(fusion: str, parts: dict[str, Tensor], layout: AttentionLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Projection matrices (rows, inputs) -> q, k, v (heads, head_dim, inputs)."""
    heads, groups, dim = layout.num_attention_heads, layout.num_key_value_heads, layout.head_dim
    if fusion == "qkv_per_group_interleaved":
        grouped = parts["qkv"].unflatten(0, (groups, heads // groups + 2, dim))
        return grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]
    if fusion == "qkv_concat":
        sizes = [heads * dim, groups * dim, groups * layout.v_head_dim]
        q, k, v = parts["qkv"].split(sizes)
    else:
        q, k, v = parts["q"], parts["k"], parts["v"]
    return q.unflatten(0, (heads, dim)), k.unflatten(0, (groups, dim)), v.unflatten(0, (groups, layout.v_head_dim))


def _fuse(fusion: str, rows: dict[str, Tensor], layout: AttentionLayout) -> dict[str, Tensor]:
    """The inverse of `_split`."""
    q, k, v = rows["q"], rows["k"], rows["v"]
    if fusion == "qkv_per_group_interleaved":
        queries = q.unflatten(0, (layout.num_key_value_heads, -1))
        return {"qkv": torch.cat([queries, k[:, None], v[:, None]], dim=1).flatten(0, 2)}
    if fusion == "qkv_concat":
        return {"qkv": torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])}
    return {part: tensor.flatten(0, 1) for part, tensor in rows.items()}


def _fit_bias(tensor: Tensor, width: int, biased: bool) -> Tensor:
    """(heads, head_dim, width + 1 where `biased`): a zero column is added or dropped."""
    column = tensor[..., width:]
    if biased:
        return tensor if column.shape[-1] else torch.cat([tensor, torch.zeros_like(tensor[..., :1])], dim=-1)
    if column.any():
        raise ValueError("the weights have a bias, and the stock class has no room for it")
    return tensor[..., :width]
