"""Find the models that can become stock DeepSeek, and plan their tensors outside attention (deepseek.yaml)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any

import torch
import yaml
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.header import TensorEntry
from headwise.io.reader import Checkpoint, make_buffers
from headwise.io.writer import OutputTensor
from headwise.models.config import stock_text_config
from headwise.models.deepseek import ATTENTION, LAYERS, residual_scale
from headwise.models.layout import AttentionLayout

# No shared experts and one group: the router chooses among all experts.
NO_OTHER_EXPERTS = {"n_shared_experts": 0, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ScaledCopy:
    """One output tensor outside attention: `factor` times (a block of rows of) one source tensor.

    A factor of exactly 1 and no part means that the source's bytes can be copied. With `stack`, the output is a
    stack of experts, and `source` the first of their tensors.

    Attributes:
        name: of the output tensor.
        source: of the source tensor.
        factor: on its values.
        part: (index, count) of equal blocks of rows.
        stack: for every expert the source tensors whose rows follow each other.
    """

    name: str
    source: str
    factor: float = 1.0
    part: tuple[int, int] | None = None
    stack: tuple[tuple[str, ...], ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The source tensors, in the order of their rows."""
        return tuple(chain.from_iterable(self.stack)) or (self.source,)

    def shape(self, source_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output tensor.

        Args:
            source_shape: shape of the source tensor.
        """
        if self.stack:
            return (len(self.stack), len(self.stack[0]) * source_shape[0], *source_shape[1:])
        rows = source_shape[0] // self.part[1] if self.part else source_shape[0]
        return (rows, *source_shape[1:])

    def keeps_bytes(self, source: TensorEntry, dtype: torch.dtype) -> bool:
        """Return whether the output tensor has the bytes of the source tensor.

        Args:
            source: the source tensor.
            dtype: dtype of the output.
        """
        return self.factor == 1 and self.part is None and not self.stack and source.dtype == dtype

    def chunks(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the output tensor in flat chunks, computed in float64 and rounded once to `dtype`.

        No tensor is in memory as a whole. A CPU takes four times as long to scale a whole matrix of a 7B model,
        because its values in float64 are written to new memory.

        Args:
            checkpoint: the source.
            dtype: dtype of the output.

        Raises:
            HeadwiseError: the experts differ in shape, or the source cannot be read.
        """
        first = checkpoint.tensors[self.source].shape
        place, count = self.part or (0, 1)
        size, buffers = math.prod(first) // count, make_buffers(1)
        for name in self.sources:
            entry = checkpoint.tensors[name]
            if entry.shape != first:
                raise HeadwiseError(f"Tensor {name} has not the shape {first} of {self.source}.")
            start = -place * size  # of the chunk, counted from the first element of the part
            for chunk in checkpoint.chunks(name, buffers):
                values = chunk.view(entry.dtype)
                own = values[max(0, -start) : max(0, size - start)]
                if len(own):
                    yield own.to(dtype, copy=True) if self.factor == 1 else (own.double() * self.factor).to(dtype)
                start += len(values)
                if start >= size:
                    break


@dataclass(frozen=True)
class StockMla:
    """A stock class with MLA, a row of `classes` in deepseek.yaml.

    Attributes:
        model_type: of its config.
        architecture: its name.
        auto_class: the transformers class that loads it.
        plain_rope: whether its default rope type rotates by the default grid.
        marks: fields by which a config that headwise wrote is known.
        config: other fields of its config.
        rope: other rope parameters.
        note: a line of the plan, or None.
        sparse: for each type of sparse attention the name of the class with an indexer.
        indexed: whether its layers have an indexer.
        shared: name of the class whose layers may share an indexer; None: there is none.
        interleaved: whether RoPE rotates neighbouring elements of an indexer, in place of the two halves.
    """

    model_type: str
    architecture: str
    auto_class: str
    plain_rope: bool
    marks: Mapping[str, Any]
    config: Mapping[str, Any]
    rope: Mapping[str, Any]
    note: str | None
    sparse: Mapping[str, str] = field(default_factory=dict)
    indexed: bool = False
    shared: str | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class MlaSource:
    """A source model that stock DeepSeek can express.

    Attributes:
        tensors: rule of each tensor outside attention, by its name with `*` for the layer index.
        factors: factors on the embeddings, the residual branches (attention and MLP outputs) and the logits.
        attention_scale: the source's factor on attention scores; None: 1 / sqrt(head_dim).
        stock: the stock class of the result.
        experts: fields of its config that describe a mixture of experts; empty for a dense model.
    """

    tensors: Mapping[str, list[list[Any]]]
    factors: Mapping[str, float]
    attention_scale: float | None
    stock: StockMla
    experts: Mapping[str, Any]


@cache
def _table() -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load(
        resources.files(__package__).joinpath("deepseek.yaml").read_text("utf-8")
    )
    return result


def find_mla_source(
    config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, sparse: str | None = None
) -> MlaSource:
    """Find the row of a model that can become MLA.

    Args:
        config: the text config of the source. A field that it leaves out has the default of its stock class.
        dtype: dtype of the output. float16 is refused: the linear latent norm needs weights near 1e-9.
        sparse: the type of sparse attention of the output; None: dense.

    Returns:
        The model's tensor rules and factors.

    Raises:
        HeadwiseError: the model cannot become MLA; the message gives the reason.
    """
    table, model_type = _table(), config.get("model_type")
    if dtype == torch.float16:
        raise HeadwiseError(
            "An MLA model cannot be written in float16: its latent norm is made linear by weights near 1e-9.",
            "Use `dtype` bfloat16 or float32.",
        )
    row: dict[str, Any] | None = (table["sources"] | table["written"]).get(model_type)
    if row is None:
        reason = next(
            (entry["reason"] for entry in table["impossible"] if model_type in entry["types"]),
            f"only {', '.join(sorted(table['sources']))} have a proven mapping to stock DeepSeek",
        )
        raise HeadwiseError(
            f"A {model_type} model cannot become MLA: {reason}.", "It can become GQA or MQA: `to` gqa `groups` N."
        )
    stock = stock_text_config(str(model_type), dict(config))
    config = stock.to_dict()
    for refusal in row["refuse"]:
        value = config.get(refusal["key"])
        if value not in refusal["unless"]:
            raise HeadwiseError(
                f"config.json: {refusal['key']} is {value!r}: {refusal['reason']}.",
                "It can become GQA or MQA: `to` gqa `groups` N.",
            )
    own = {name: _positive(config, key, 1.0) for name, key in row.get("multipliers", {}).items()}
    stream = residual_scale(_positive(config, "rms_norm_eps", 1e-6))
    scale = row.get("attention_scale")
    choice = row.get("class", "deepseek_v3")
    name = choice if isinstance(choice, str) else choice[bool(config.get(choice["by"]))]
    stock_class = StockMla(**table["classes"][name])
    tensors = row["tensors"] if isinstance(row["tensors"], str) else row["tensors"][name]
    experts = {theirs: getattr(stock, own) for own, theirs in row.get("experts", {}).items()}
    if experts:
        experts |= {"num_experts_per_tok": stock.num_experts_per_tok, **NO_OTHER_EXPERTS}
    if sparse is not None:
        if sparse not in stock_class.sparse:
            raise HeadwiseError(
                f"A {model_type} model becomes {stock_class.architecture}, which no stock class with an indexer "
                "replaces.",
                "Leave out `sparse`.",
            )
        stock_class = StockMla(**table["classes"][stock_class.sparse[sparse]])
    return MlaSource(
        tensors=table["tensors"][tensors],
        stock=stock_class,
        experts=experts,
        factors={
            "embedding": stream * own.get("embedding", 1.0),
            "residual": stream * own.get("residual", 1.0),
            "logits": 1.0 / own.get("logits", 1.0),
        },
        attention_scale=_positive(config, scale, 1.0) if scale else None,
    )


def refuse_windows(layouts: Iterable[AttentionLayout]) -> None:
    """Refuse a model with a sliding window, which no stock MLA model has.

    Args:
        layouts: of every layer of the source.

    Raises:
        HeadwiseError: a layer has a window.
    """
    window = next((layout.sliding_window for layout in layouts if layout.sliding_window), None)
    if window is not None:
        raise HeadwiseError(
            f"config.json: sliding_window is {window}: no stock MLA model has a sliding window.",
            "It can become GQA or MQA: `to` gqa `groups` N. `sliding_window` 0 with `to` mla removes the windows.",
        )


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a positive number of the config, or the stock class's `default` if the config has none."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise HeadwiseError(f"config.json has {key}: {value!r}, and a number above zero is needed.")
    return float(value)


def plan_scaled_copies(source: MlaSource, names: Iterable[str], attention: Iterable[str]) -> list[ScaledCopy]:
    """Return the plan for every tensor of the checkpoint outside attention.

    Args:
        source: the source model.
        names: all tensor names of the checkpoint.
        attention: names of the tensors that the conversion rewrites.

    Raises:
        HeadwiseError: the table has no rule for a tensor. The error prevents a silent drop.
    """
    names, attention = set(names), set(attention)
    carried: list[ScaledCopy] = []
    unknown: list[str] = []
    stacks: dict[tuple[str, float], dict[tuple[int, int], str]] = {}
    for name in sorted(names - attention):
        layer = next(iter(re.findall(r"\.layers\.(\d+)\.", name)), "")
        expert = next(iter(re.findall(r"\.experts\.(\d+)\.", name)), "")
        pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
        rule = source.tensors.get(re.sub(r"\.experts\.\d+\.", ".experts.#.", pattern))
        if rule is None:
            unknown.append(name)
            continue
        for target, factor, part in rule:
            output, scale = (
                target.replace("*", layer).replace("#", expert),
                source.factors[factor] if factor else 1.0,
            )
            if part and part[0] == "stack":
                stacks.setdefault((output, scale), {})[int(expert), part[1]] = name
            else:
                carried.append(ScaledCopy(output, name, scale, tuple(part) if part else None))
    if unknown:
        raise HeadwiseError(
            f"Stock DeepSeek has no place for the tensor {unknown[0]} ({len(unknown)} such in all)."
        )
    carried += [_stacked(output, scale, own) for (output, scale), own in stacks.items()]
    if HEAD not in names:
        # Tied embeddings: engines other than transformers fail without an explicit head.
        carried.append(ScaledCopy(HEAD, EMBEDDING, source.factors["logits"]))
    return carried


def _stacked(name: str, factor: float, own: Mapping[tuple[int, int], str]) -> ScaledCopy:
    """Return the stack of a layer's experts from their tensors by (expert, place)."""
    experts, places = max(e for e, _ in own) + 1, max(p for _, p in own) + 1
    missing = next(((e, p) for e in range(experts) for p in range(places) if (e, p) not in own), None)
    if missing is not None:
        raise HeadwiseError(f"The experts of {name} are incomplete: expert {missing[0]} lacks a tensor.")
    stack = tuple(tuple(own[e, p] for p in range(places)) for e in range(experts))
    return ScaledCopy(name, stack[0][0], factor, None, stack)


def empty_tensors(source: MlaSource, num_hidden_layers: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors without elements of a mixture of experts: its class has shared experts, of width 0 here.

    Args:
        source: the source model.
        num_hidden_layers: of the model.
        hidden_size: of the model.

    Returns:
        Shapes by name; none for a dense model.
    """
    shapes = {"gate_proj": (0, hidden_size), "up_proj": (0, hidden_size), "down_proj": (hidden_size, 0)}
    return {
        f"{LAYERS.format(layer=layer)}.mlp.shared_experts.{name}.weight": shape
        for layer in range(num_hidden_layers if source.experts else 0)
        for name, shape in shapes.items()
    }


def written_class(config: Mapping[str, Any]) -> StockMla | None:
    """Return the stock class of an MLA config that headwise wrote; None for any other config.

    Args:
        config: the config.json.
    """
    for row in _table()["classes"].values():
        stock = StockMla(**row)
        depth = config.get("num_hidden_layers")
        dense = depth is not None and config.get("first_k_dense_replace") == depth
        marked = all(config.get(key) == value for key, value in stock.marks.items()) if stock.marks else dense
        if config.get("architectures") == [stock.architecture] and marked:
            return stock
    return None


def sharing_class(stock: StockMla) -> StockMla | None:
    """Return the class whose layers may share an indexer, and that computes the same function otherwise.

    Args:
        stock: a class with indexers.
    """
    return StockMla(**_table()["classes"][stock.shared]) if stock.shared else None


def plan_outputs(
    copies: Iterable[ScaledCopy],
    tensors: Mapping[str, TensorEntry],
    attention_shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> list[OutputTensor]:
    """Return every tensor of the MLA model in the order of the source.

    The attention of a layer comes before the first of its other tensors.

    Args:
        copies: of the tensors outside attention.
        tensors: of the source, by name.
        attention_shapes: name inside the attention module and shape of every attention tensor of a layer.
        dtype: of the output.
    """
    order = {name: i for i, name in enumerate(tensors)}
    outputs: list[OutputTensor] = []
    written: set[str] = set()
    for copy in sorted(copies, key=lambda copy: (order[copy.source], copy.name)):
        layer = re.match(r"model\.layers\.\d+", copy.name)
        if layer and layer[0] not in written:
            written.add(layer[0])
            prefix = f"{layer[0]}.{ATTENTION}"
            outputs += [OutputTensor(f"{prefix}.{name}", dtype, s, None) for name, s in attention_shapes.items()]
        entry = tensors[copy.source]
        source = copy.source if copy.keeps_bytes(entry, dtype) else None
        outputs.append(OutputTensor(copy.name, dtype, copy.shape(entry.shape), source))
    return outputs
