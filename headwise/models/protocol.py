"""Describe the attention layers of grouped (MHA, GQA, MQA) and MLA models by one protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models import deepseek, rope
from headwise.models.architecture import find_architecture
from headwise.models.config import MAX_LAYERS, check_rope, checked_size, stock_text_config
from headwise.models.deepseek import ATTENTION, LAYERS
from headwise.models.layout import AttentionLayout, IndexerShape, LatentWeights
from headwise.models.mla_source import written_class
from headwise.models.table import QkNorm, find_parts, load_table, supported_model_types

LATENT_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
)


INDEXER_SIZES = tuple(field.name for field in fields(IndexerShape))


class AttentionModel(Protocol):
    """Names and layouts of the attention layers of a model type.

    `Architecture` implements it for MHA, GQA and MQA, `LatentModel` for MLA. Callers that need to distinguish them
    use `AttentionLayout.kind`.
    """

    @property
    def model_type(self) -> str:
        """The model type of the language model."""

    @property
    def auto_class(self) -> str:
        """The transformers class that loads the checkpoint."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of a decoder layer in checkpoints, "model.layers.{layer}"; the first one is the checkpoint's."""

    @property
    def module(self) -> str:
        """Path of a decoder layer in the stock model, "model.layers.{layer}"."""

    @property
    def attention(self) -> str:
        """Name of the attention module in a decoder layer."""

    @property
    def output_projection(self) -> str:
        """Name of the output projection in the attention module."""

    @property
    def reads_pairs(self) -> bool:
        """Whether the model is an encoder-decoder, which reads a source and a target."""

    @property
    def is_decoder(self) -> bool:
        """Whether text runs one attention stack, which has a cache."""

    @property
    def cached(self) -> bool:
        """Whether the attention has a cache."""

    def cross_states(self, config: dict[str, Any]) -> dict[str, int]:
        """Return the arguments from which cross-attention makes keys and values, with their widths; none without.

        Args:
            config: the config.json.
        """

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a config.json that describes the language model.

        Args:
            config: the config.json.
        """

    def stock_config(self, config: dict[str, Any]) -> Any:
        """Return the stock config object of the language model. Callers share it and must not change it.

        Args:
            config: the config.json.
        """

    def layouts(self, config: dict[str, Any]) -> list[AttentionLayout]:
        """Return the layout of every layer.

        Args:
            config: the config.json.

        Raises:
            HeadwiseError: a field has the wrong type or an impossible value.
        """

    def has_bias(self, config: dict[str, Any]) -> bool:
        """Return whether queries, keys and values have biases.

        Args:
            config: the config.json.
        """

    def qk_norm(self, config: dict[str, Any]) -> QkNorm | None:
        """Return the norms on queries and keys; None if the model has none.

        Args:
            config: the config.json.
        """

    def first_names(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Return `tensor_names` of the first layer with attention.

        Args:
            config: the config.json.
        """

    def tensor_names(self, config: dict[str, Any], layer: int) -> tuple[str, ...]:
        """Return the names of a layer's attention tensors, which a conversion rewrites.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
        """

    def read_layer(self, config: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> Any:
        """Return a layer's weights in float64: `LayerWeights`, or `LatentWeights` of an MLA model.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
            tensors: at least those of `tensor_names`, in any floating dtype.
        """

    def attention_path(self, layer: int) -> str:
        """Return the path of a layer's attention module in the stock model.

        Args:
            layer: index of the decoder layer.
        """

    def tensors(self, checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
        """Read all tensors of a layer's attention, including those that no conversion changes.

        Args:
            checkpoint: the checkpoint of the model.
            layer: index of the decoder layer.

        Returns:
            Tensors by their names in the checkpoint.
        """


@dataclass(frozen=True)
class LatentModel:
    """The attention layers of a stock model with MLA, as headwise writes it."""

    model_type: str = "deepseek_v3"
    auto_class: str = "AutoModelForCausalLM"
    indexed: bool = False
    layers: tuple[str, ...] = (LAYERS,)
    module: str = LAYERS
    attention: str = ATTENTION
    output_projection: str = "o_proj"
    reads_pairs: bool = False
    is_decoder: bool = True
    cached: bool = True

    def cross_states(self, config: dict[str, Any]) -> dict[str, int]:
        """Return none: there is no cross-attention.

        Args:
            config: the config.json.
        """
        return {}

    def text_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config itself.

        Args:
            config: the config.json.
        """
        return config

    def stock_config(self, config: dict[str, Any]) -> Any:
        """Return the stock config object. Callers share it and must not change it.

        Args:
            config: the config.json.
        """
        return stock_text_config(self.model_type, config)

    def layouts(self, config: dict[str, Any]) -> list[AttentionLayout]:
        """Return the layout of every layer.

        Args:
            config: the config.json.

        Raises:
            HeadwiseError: a field has the wrong type or an impossible value.
        """
        layers, heads, rank, rope_dim, nope_dim, v_dim = (checked_size(config, name) for name in LATENT_SIZES)
        if not 0 < layers <= MAX_LAYERS:
            raise HeadwiseError(f"config.json has num_hidden_layers: {layers}, and 1 to {MAX_LAYERS} are possible.")
        check_rope(config.get("rope_parameters"))
        layout = AttentionLayout(heads, heads, nope_dim + rope_dim, v_dim, rope_dim, None, rank, rope_dim)
        if self.indexed:
            layout = replace(layout, indexer=IndexerShape(*(checked_size(config, n) for n in INDEXER_SIZES)))
            kinds = getattr(self.stock_config(config), "indexer_types", None) or ["full"] * layers
            return [replace(layout, shares_indexer=kind == "shared") for kind in kinds]
        return [layout] * layers

    def has_bias(self, config: dict[str, Any]) -> bool:
        """Return whether the projections have biases.

        Args:
            config: the config.json.
        """
        return bool(config.get("attention_bias"))

    def qk_norm(self, config: dict[str, Any]) -> QkNorm | None:
        """Return None: the norms of MLA as headwise writes it are linear.

        Args:
            config: the config.json.
        """
        return None

    def first_names(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the attention tensors of the first layer.

        Args:
            config: the config.json.
        """
        return self.tensor_names(config, 0)

    def tensor_names(self, config: dict[str, Any], layer: int) -> tuple[str, ...]:
        """Return the names of a layer's attention tensors, without those of its indexer.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
        """
        shapes = deepseek.attention_shapes(
            self.layouts(config)[layer],
            config["hidden_size"],
            bias=self.has_bias(config),
            q_lora_rank=config.get("q_lora_rank"),
        )
        return tuple(f"{self.attention_path(layer)}.{name}" for name in shapes)

    def read_layer(self, config: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> LatentWeights:
        """Return a layer in the norm-free parametrization, float64, without its output bias.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
            tensors: at least those of `tensor_names`, in any floating dtype.
        """
        frequencies, _ = rope.frequencies(
            config["rope_parameters"], config["qk_rope_head_dim"], config["max_position_embeddings"]
        )
        return deepseek.read_attention(tensors, self.attention_path(layer), config, frequencies)

    def attention_path(self, layer: int) -> str:
        """Return the path of a layer's attention module, which is also its prefix in the checkpoint.

        Args:
            layer: index of the decoder layer.
        """
        return f"{LAYERS.format(layer=layer)}.{ATTENTION}"

    def tensors(self, checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
        """Read all tensors of a layer's attention.

        Args:
            checkpoint: the MLA checkpoint.
            layer: index of the decoder layer.

        Returns:
            Tensors by their names in the checkpoint.
        """
        return checkpoint.read_prefix(f"{self.attention_path(layer)}.")


def find_attention_model(config: dict[str, Any], names: Iterable[str] = ()) -> AttentionModel:
    """Find the description of a checkpoint's attention layers.

    Args:
        config: the checkpoint's config.json.
        names: the checkpoint's tensor names, as in `find_architecture`.

    Returns:
        The names and layouts of the attention layers.

    Raises:
        HeadwiseError: the model type is unknown, or the model has MLA and headwise did not write it.
    """
    model_type = config.get("model_type")
    stock = written_class(config)
    if stock is not None and isinstance(model_type, str):
        return LatentModel(stock.model_type, stock.auto_class, stock.indexed)
    if "kv_lora_rank" in config and model_type not in supported_model_types():
        raise HeadwiseError(
            f"config.json describes a {model_type} model with multi-head latent attention (MLA) that headwise did "
            "not write.",
            "Of models with MLA, headwise reads those that it writes.",
        )
    return find_architecture(config, names)


def reads_pairs(config: dict[str, Any]) -> bool:
    """Return whether a checkpoint is an encoder-decoder that headwise knows, which reads a source and a target.

    Args:
        config: the checkpoint's config.json.
    """
    return any(row.part == "decoder" and row.on_text for row in find_parts(config, load_table()))


def read_latent_layer(checkpoint: Checkpoint, layer: int) -> tuple[LatentWeights, Tensor | None]:
    """Read one attention layer of an MLA model that headwise wrote.

    Args:
        checkpoint: the model.
        layer: index of the decoder layer.

    Returns:
        The layer in the norm-free parametrization, float64, and its output bias (D,) or None.
    """
    model = LatentModel()
    tensors = model.tensors(checkpoint, layer)
    weights = model.read_layer(checkpoint.config, layer, tensors)
    return weights, tensors.get(f"{model.attention_path(layer)}.o_proj.bias")
