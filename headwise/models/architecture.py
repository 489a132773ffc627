"""Map the names, fusions and config keys of each model type to `AttentionLayout` and `LayerWeights`, and back.

A model type is a row of `architectures.yaml`; no code here names a model type. Values that a config leaves out
(default head counts, sliding patterns, the partial rotary factor) come from the stock config class. So there is no
second set of defaults that can become outdated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.quantized.quantization import QUANTIZATION_KEYS
from headwise.io.reader import Checkpoint
from headwise.models.config import (
    CODE_KEYS,
    both_spellings,
    complete_part,
    positive_size,
    rotary_width,
    stock_text_config,
    whole_part,
    with_linear_layers,
)
from headwise.models.fusion import (
    check_shapes,
    fit_bias,
    fuse,
    half_split_order,
    present,
    read_norm,
    read_projection,
    reorder,
    split,
    split_gate,
    stored_norm,
)
from headwise.models.layout import AttentionLayout, LayerWeights
from headwise.models.table import ArchitectureRow, QkNorm, find_parts, find_row, load_table, require_variant

ROPE = "rope"


@dataclass(frozen=True)
class Architecture(ArchitectureRow):
    """A row of the table, applied to one checkpoint's config and tensors.

    Attributes:
        parts: the attention stacks of a model with several. The object's own row is then that of the cached
            self-attention, and its layers are all attention modules in the order in which they run.
        order: of every layer, the index of its part and its number in that part's stack.
    """

    parts: tuple[Architecture, ...] = ()
    order: tuple[tuple[int, int], ...] = ()

    @property
    def reads_pairs(self) -> bool:
        """Whether the model is an encoder-decoder, which reads a source and a target."""
        return len({part.module for part in self.parts if part.on_text}) > 1

    @property
    def is_decoder(self) -> bool:
        """Whether text runs one attention stack, which has a cache."""
        return self.cached and self.on_text and {p.part for p in self.parts if p.on_text} <= {self.part}

    def cross_states(self, config: dict[str, Any]) -> dict[str, int]:
        """Return the arguments from which cross-attention makes keys and values, with their widths; none without.

        Args:
            config: the checkpoint's config.json.
        """
        return {
            p.states: getattr(p.stock_config(config), p.sizes["inputs"]) for p in self.parts if p.states is not None
        }

    def at(self, layer: int) -> tuple[Architecture, int]:
        """Return the row of a layer, and the layer's number in the stack of that row.

        Args:
            layer: index of the layer.
        """
        part, number = self.order[layer] if self.parts else (0, layer)
        return (self.parts[part] if self.parts else self), number

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the part of `config` that describes the language model; the same dictionary, not a copy.

        Args:
            config: the checkpoint's config.json.
        """
        key = next((key for key in (self.text_key, self.old_text_key) if key and config.get(key)), self.text_key)
        return complete_part(config, key) if key else config

    def stock_config(self, config: dict[str, Any]) -> Any:
        """Return the stock config object of the language model. Callers share it and must not change it.

        Args:
            config: the checkpoint's config.json.
        """
        stock = stock_text_config(self.model_type, self.text_config(config))
        # The whole config fills in what its parts have in common, such as the width of the encoder's output.
        composite = self.text_key and self.wrapper in load_table().composites
        return whole_part(config, str(self.text_key)) if composite else stock

    def layouts(self, config: dict[str, Any]) -> list[AttentionLayout]:
        """Return the layout of every layer.

        Args:
            config: the checkpoint's config.json.

        Raises:
            HeadwiseError: a field of the config has the wrong type or an impossible value.
        """
        if self.parts:
            stacks = [part.layouts(config) for part in self.parts]
            return [stacks[part][number] for part, number in self.order]
        stock = self.stock_config(config)
        heads = positive_size(stock, self.sizes["heads"])
        groups = positive_size(stock, self.num_key_value_heads) if self.num_key_value_heads else heads
        width = positive_size(stock, "hidden_size")
        if heads % groups:
            raise HeadwiseError(
                f"config.json has {self.num_key_value_heads}: {groups}, which does not divide "
                f"{self.sizes['heads']}: {heads}."
            )
        own_head_dim = getattr(stock, self.sizes["head_dim"], None)
        if not own_head_dim and width % heads:
            raise HeadwiseError(
                f"config.json has hidden_size: {width}, which {self.sizes['heads']}: {heads} does not divide."
            )
        head_dim = own_head_dim or width // heads
        rope = getattr(stock, "rope_parameters", None)
        rotary_dim = 0 if self.is_cross or not rope else rotary_width(rope, head_dim)
        layer_types = getattr(stock, "layer_types", None) or [None] * stock.num_hidden_layers
        flags = getattr(stock, self.rope_flags) if self.rope_flags else ROPE
        has_rope = flags if isinstance(flags, list) else [flags == ROPE] * stock.num_hidden_layers
        windowed = not self.is_cross and getattr(stock, "sliding_window", None)
        window = positive_size(stock, "sliding_window") if windowed else None
        if self.rope_layer_types and window:
            has_rope = [layer_type in self.rope_layer_types for layer_type in layer_types]
        layouts = [
            AttentionLayout(
                num_attention_heads=heads,
                num_key_value_heads=groups,
                head_dim=head_dim,
                v_head_dim=head_dim,
                rotary_dim=rotary_dim if has_rope[layer] else 0,
                sliding_window=window if layer_types[layer] in (None, "sliding_attention") else None,
                part=self.part,
                cached=self.cached,
                on_text=self.on_text,
                merged=self.merged is not None,
            )
            for layer in range(stock.num_hidden_layers)
        ]
        return with_linear_layers(layouts, layer_types, stock, self.linear) if self.linear else layouts

    @property
    def _usual_parts(self) -> list[Architecture]:
        """The parts that change if none is named: the cached ones, or all where nothing is cached."""
        return [part for part in self.parts if part.cached] or list(self.parts)

    def legal_groups(self, config: dict[str, Any]) -> list[int]:
        """Return the numbers of key-value heads that the stock class can use, ascending.

        Args:
            config: the checkpoint's config.json.
        """
        if self.parts:
            return sorted(set.intersection(*(set(p.legal_groups(config)) for p in self._usual_parts)))
        layout = self.layouts(config)[0]
        heads = layout.num_attention_heads
        if self.fixed_groups:
            return [layout.num_key_value_heads]
        return [groups for groups in range(1, heads + 1) if heads % groups == 0]

    def has_bias(self, config: dict[str, Any]) -> bool:
        """Return whether queries, keys and values have biases.

        Args:
            config: the checkpoint's config.json.
        """
        if isinstance(self.qkv_bias, str):
            return bool(getattr(self.stock_config(config), self.qkv_bias))
        return self.qkv_bias

    def tensor_shapes(self, config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every checkpoint tensor that holds this layer's attention.

        The output bias is not included, because no conversion changes it.

        Args:
            config: the checkpoint's config.json.
            layer: index of the decoder layer.
        """
        if self.parts:
            row, number = self.at(layer)
            return row.tensor_shapes(config, number)
        layout = self.layouts(config)[layer]
        if not layout.attends:
            return {}
        norms = self.qk_norm(config)
        stock = self.stock_config(config)
        width, states_width = stock.hidden_size, positive_size(stock, self.sizes["inputs"])
        heads, groups = layout.num_attention_heads, layout.num_key_value_heads
        dim, v_dim = layout.head_dim, layout.v_head_dim
        sizes = {"q": heads * dim * (1 + self.query_gate), "k": groups * dim, "v": groups * v_dim}
        sizes["qkv"] = sum(sizes.values())
        shapes: dict[str, tuple[int, ...]] = {}
        for part, name in self.projections.items():
            if part == "o":
                continue
            shapes[self._name(layer, name, "weight")] = (sizes[part], states_width if part in ("k", "v") else width)
            if self.has_bias(config):
                shapes[self._name(layer, name, "bias")] = (sizes[part],)
        if self.sinks:
            shapes[self.prefix(layer) + self.sinks] = (heads,)
        if norms:
            for part, name in (("q", norms.q), ("k", norms.k)):
                size = sizes[part] if norms.scope == "all" else layout.head_dim
                shapes[self._name(layer, name, "weight")] = (size,)
        shapes[self._name(layer, self.projections["o"], "weight")] = (width, heads * layout.v_head_dim)
        return shapes

    @property
    def output_projection(self) -> str:
        """Name of the output projection in the attention module."""
        return self.stock_names(self.projections["o"])[0]

    def attention_path(self, layer: int) -> str:
        """Return the path of a layer's attention module in the stock model.

        Args:
            layer: index of the decoder layer.
        """
        part, number = self.at(layer)
        return f"{part.module.format(layer=number)}.{part.stock_names(part.attention)[0]}"

    def prefix(self, layer: int) -> str:
        """Return the beginning of the names of a layer's attention tensors in the checkpoint, with its dot.

        Args:
            layer: index of the decoder layer.
        """
        part, number = self.at(layer)
        return f"{part.layers[0].format(layer=number)}.{part.attention}."

    def tensors(self, checkpoint: Checkpoint, layer: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read all tensors of a layer's attention, including those that no conversion changes.

        Args:
            checkpoint: a checkpoint that this row describes.
            layer: index of the decoder layer.
            device: of the tensors.

        Returns:
            Tensors by their names in the checkpoint.
        """
        return checkpoint.read_prefix(self.prefix(layer), device)

    def tensor_names(self, config: dict[str, Any], layer: int) -> tuple[str, ...]:
        """Return the names of this layer's attention tensors, which a conversion rewrites.

        Args:
            config: the checkpoint's config.json.
            layer: index of the decoder layer.
        """
        return tuple(self.tensor_shapes(config, layer))

    def first_names(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Return `tensor_names` of the first layer with attention."""
        names = (self.tensor_names(config, layer) for layer in range(len(self.layouts(config))))
        return next(filter(None, names))

    def read_layer(self, config: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> LayerWeights:
        """Build the float64 weights of one layer's attention from its checkpoint tensors.

        Args:
            config: the checkpoint's config.json.
            layer: index of the decoder layer.
            tensors: at least those of `tensor_names`, in any floating dtype.

        Returns:
            The layer's weights, unfused and in half-split rotary order.

        Raises:
            HeadwiseError: a tensor is missing, or its shape differs from the shape that the config implies.
        """
        if self.parts:
            part, number = self.at(layer)
            return part.read_layer(config, number, tensors)
        check_shapes(tensors, self.tensor_shapes(config, layer))
        layout = self.layouts(config)[layer]
        parts = {
            part: read_projection(tensors, self._name(layer, name, ""), self.has_bias(config))
            for part, name in self.projections.items()
            if part != "o"
        }
        gate = split_gate(parts, layout) if self.query_gate else None
        q, k, v = split(self.fusion, parts, layout)
        order = half_split_order(layout, self.rotary_layout)
        o = tensors[self._name(layer, self.projections["o"], "weight")]
        o = o.unflatten(1, (layout.num_attention_heads, layout.v_head_dim)).transpose(0, 1)
        weights = LayerWeights(
            layout=layout,
            q=reorder(q, order),
            k=reorder(k, order),
            v=v,
            o=o.to(torch.float64, memory_format=torch.contiguous_format),
            sinks=tensors[self.prefix(layer) + self.sinks].to(torch.float64) if self.sinks else None,
            gate=gate,
        )
        norms = self.qk_norm(config)
        if not norms:
            return weights

        def multiplier(name: str, heads: int) -> Tensor:
            return read_norm(tensors[self._name(layer, name, "weight")], heads, norms.scope, norms.offset)

        return replace(
            weights,
            q_norm=reorder(multiplier(norms.q, layout.num_attention_heads), order),
            k_norm=reorder(multiplier(norms.k, layout.num_key_value_heads), order),
            norm_scope=norms.scope,
        )

    def write_layer(
        self, config: dict[str, Any], layer: int, weights: LayerWeights, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Build the checkpoint tensors of one layer; the inverse of `read_layer`.

        Args:
            config: the source's config.json; the number of key-value heads is taken from `weights.layout`.
            layer: index of the decoder layer.
            weights: the layer, converted or not.
            dtype: dtype of the returned tensors. Weights are rounded only here.

        Returns:
            Tensors by their names in the checkpoint.

        Raises:
            ValueError: the stock class cannot hold these weights: they have a bias that the class lacks, they lack
                its norms, sinks or gates, or their norm weights differ between heads that share one weight there.
        """
        if self.parts:
            row, number = self.at(layer)
            return row.write_layer(config, number, weights, dtype)
        layout = weights.layout
        order = torch.argsort(half_split_order(layout, self.rotary_layout))
        biased = self.has_bias(config)
        stock = self.stock_config(config)
        widths = {role: positive_size(stock, self.sizes["inputs"]) for role in ("k", "v")}
        moved = {"q": reorder(weights.q, order), "k": reorder(weights.k, order), "v": weights.v}
        rows = {part: fit_bias(t, widths.get(part, weights.hidden_size), biased) for part, t in moved.items()}
        if self.query_gate:
            gate = fit_bias(present(weights.gate, layer, "gates of heads"), weights.hidden_size, biased)
            rows["q"] = torch.cat([rows["q"], gate], 1)
        out: dict[str, Tensor] = {}
        if self.sinks:
            out[self.prefix(layer) + self.sinks] = present(weights.sinks, layer, "sinks")
        for part, matrix in fuse(self.fusion, rows, layout).items():
            name = self.projections[part]
            out[self._name(layer, name, "weight")] = matrix[:, : widths.get(part, weights.hidden_size)]
            if biased:
                out[self._name(layer, name, "bias")] = matrix[:, -1]
        norms = self.qk_norm(config)
        if norms:
            for name, own in ((norms.q, weights.q_norm), (norms.k, weights.k_norm)):
                norm = present(own, layer, "norms on queries and keys")
                shared = stored_norm(norm, norms.scope, f"layer {layer}: heads share the weight of {name}")
                out[self._name(layer, name, "weight")] = (shared[:, order] - norms.offset).flatten()
        o = weights.o.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)
        out[self._name(layer, self.projections["o"], "weight")] = o.flatten(1)
        return {name: tensor.to(dtype).contiguous() for name, tensor in out.items()}

    def with_groups(self, config: dict[str, Any], num_key_value_heads: int | Mapping[str, int]) -> dict[str, Any]:
        """Return a new config with this many key-value heads, readable by transformers 4 and 5.

        Args:
            config: the checkpoint's config.json.
            num_key_value_heads: number of key-value heads in the new config; of a model of several attention
                stacks, that of all cached ones, or a number for each part that changes.

        Raises:
            HeadwiseError: the stock class cannot hold that number.
        """
        if self.parts:
            if isinstance(num_key_value_heads, int):
                num_key_value_heads = {p.part: num_key_value_heads for p in self._usual_parts}
            counts = {p.count_key: num_key_value_heads[p.part] for p in self.parts if p.part in num_key_value_heads}
            for p in self.parts:
                config = p.with_groups(config, counts.get(p.count_key, p.layouts(config)[0].num_key_value_heads))
            return config
        count = num_key_value_heads
        if not isinstance(count, int):
            count = count.get(self.part, self.layouts(config)[0].num_key_value_heads)
        legal = self.legal_groups(config)
        if count not in legal:
            heads = self.layouts(config)[0].num_attention_heads
            why = self.fixed_groups or f"{heads} query heads cannot share them equally"
            raise HeadwiseError(
                f"{self.wrapper or self.model_type} with {heads} query heads cannot have {count} key-value heads: "
                f"{why}.",
                f"Legal: {', '.join(map(str, legal))}.",
            )
        new = copy.deepcopy(config)
        text = self.text_config(new)
        stock = self.stock_config(config)
        if self.num_key_value_heads:
            text[self.sizes["heads"]] = getattr(stock, self.sizes["heads"])
            text[self.num_key_value_heads] = count
        if stock.to_dict().get(self.sizes["head_dim"]):
            text[self.sizes["head_dim"]] = getattr(stock, self.sizes["head_dim"])
        if self.on_text:
            text["rope_parameters"] = copy.deepcopy(stock.rope_parameters)
            text.update(both_spellings(text, self.model_type, self.old_rope_names, self.old_rope_scaling))
        for part in (new, text):
            dtype = part.get("dtype", part.get("torch_dtype"))
            if dtype is not None:
                part["dtype"] = part["torch_dtype"] = dtype
            for key in (*CODE_KEYS, *QUANTIZATION_KEYS):
                part.pop(key, None)
        return new

    @property
    def count_key(self) -> tuple[str | None, str | None]:
        """Where config.json holds the number of KV heads: parts with the same place change together."""
        return self.text_key, self.num_key_value_heads

    def _name(self, layer: int, name: str, kind: str) -> str:
        return f"{self.layers[0].format(layer=layer)}.{self.attention}.{name}.{kind}"

    def qk_norm(self, config: dict[str, Any]) -> QkNorm | None:
        """Return the norms on queries and keys; None if the model has none.

        Args:
            config: the checkpoint's config.json.
        """
        return self.norms.of(self.stock_config(config)) if self.norms else None


def find_architecture(config: dict[str, Any], names: Iterable[str] = ()) -> Architecture:
    """Find the row of the table for a checkpoint.

    Args:
        config: the checkpoint's config.json.
        names: the checkpoint's tensor names. They select the naming where a model type has more than one.
            Without them, the naming that `save_pretrained` writes is assumed.

    Returns:
        The row, with the layer naming and the transformers class of this checkpoint.

    Raises:
        HeadwiseError: the model type is unknown or refused, or the stock class does not accept the config.
    """
    table = load_table()
    if rows := find_parts(config, table):
        return _composite(config, rows, set(names))
    arch = Architecture(**vars(find_row(config, table)))
    require_variant(arch, arch.stock_config(config))
    arch.layouts(config)
    heads = config.get("architectures")
    head = str(heads[0]) if isinstance(heads, list) and heads else ""
    auto_class = next((auto for end, auto in table.auto_classes.items() if head.endswith(end)), arch.auto_class)
    present = set(names)
    candidates = [replace(arch, auto_class=auto_class, layers=(layers,)) for layers in arch.layers]
    return next((a for a in candidates if present.issuperset(a.first_names(config))), candidates[0])


def _composite(config: dict[str, Any], rows: Sequence[ArchitectureRow], names: set[str]) -> Architecture:
    """Return the architecture of a model of several attention stacks, its layers in the order in which they run."""
    for naming in range(len(rows[0].layers)):
        arch = _in_order(config, [replace(row, layers=(row.layers[naming],)) for row in rows])
        if names.issuperset(arch.tensor_names(config, 0)):
            return arch
    return _in_order(config, [replace(row, layers=row.layers[:1]) for row in rows])


def _in_order(config: dict[str, Any], rows: Iterable[ArchitectureRow]) -> Architecture:
    parts = tuple(Architecture(**vars(row)) for row in rows)
    stacks = list(dict.fromkeys(part.module for part in parts))
    places = []
    for index, part in enumerate(parts):
        stock, rule = part.stock_config(config), part.only_layers or {"key": "", "listed": False}
        require_variant(part, stock)
        listed = getattr(stock, rule["key"], ())
        numbers = [n for n in range(stock.num_hidden_layers) if (n in listed) == rule["listed"]]
        places += [(stacks.index(part.module), number, index) for number in numbers]
    order = tuple((index, number) for _, number, index in sorted(places))
    own = next((part for part in parts if part.cached and not part.is_cross), parts[0])
    arch = replace(own, parts=parts, order=order)
    arch.layouts(config)
    return arch
