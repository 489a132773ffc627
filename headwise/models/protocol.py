"""Describe the attention layers of grouped (MHA, GQA, MQA) and MLA models by one protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models import deepseek, rope
from headwise.models.architecture import find_architecture
from headwise.models.config import MAX_LAYERS, check_rope, checked_size, stock_text_config
from headwise.models.deepseek import ATTENTION, LAYERS
from headwise.models.fusion import check_shapes
from headwise.models.layout import AttentionLayout, IndexerShape, LatentWeights, NormedLatent
from headwise.models.mla_source import written_class
from headwise.models.table import QkNorm, find_parts, load_table, require_values

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

    def tensor_shapes(self, config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor of `tensor_names`.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
        """

    def read_layer(self, config: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> Any:
        """Return a layer's weights in float64: `LayerWeights`, or those of an MLA model.

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

    def prefix(self, layer: int) -> str:
        """Return the beginning of the names of a layer's attention tensors in the checkpoint, with its dot.

        Args:
            layer: index of the decoder layer.
        """

    def tensors(self, checkpoint: Checkpoint, layer: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read all tensors of a layer's attention, including those that no conversion changes.

        Args:
            checkpoint: the checkpoint of the model.
            layer: index of the decoder layer.
            device: of the tensors.

        Returns:
            Tensors by their names in the checkpoint.
        """


@dataclass(frozen=True)
class LatentModel:
    """The attention layers of a stock model with MLA.

    Attributes:
        linear: whether the norms of its latents are linear, as headwise writes them.
        half_split: whether row f of the rotary key belongs to row f + width / 2; else the rows alternate.
    """

    model_type: str = "deepseek_v3"
    auto_class: str = "AutoModelForCausalLM"
    indexed: bool = False
    linear: bool = True
    half_split: bool = False
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
        if not self.linear:  # a config of others may leave out what its class has by default
            config = self.stock_config(config).to_dict()
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
        return tuple(self.tensor_shapes(config, layer))

    def tensor_shapes(self, config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of a layer's attention tensors, without those of its indexer.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
        """
        stock = self.stock_config(config)
        shapes = deepseek.attention_shapes(
            self.layouts(config)[layer],
            stock.hidden_size,
            bias=self.has_bias(config),
            q_lora_rank=stock.q_lora_rank,
        )
        return {f"{self.attention_path(layer)}.{name}": shape for name, shape in shapes.items()}

    def read_layer(self, config: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> Any:
        """Return a layer in float64, without its output bias.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
            tensors: at least those of `tensor_names`, in any floating dtype.

        Returns:
            `LatentWeights` without norms where these are linear, else `NormedLatent`.
        """
        if not self.linear:
            return self.read_normed(config, layer, tensors)
        frequencies, _ = rope.frequencies(
            config["rope_parameters"], config["qk_rope_head_dim"], config["max_position_embeddings"]
        )
        return deepseek.read_attention(tensors, self.attention_path(layer), config, frequencies)

    def read_normed(self, config: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> NormedLatent:
        """Return a layer with its norms in float64, without its output bias.

        Args:
            config: the config.json.
            layer: index of the decoder layer.
            tensors: at least those of `tensor_names`, in any floating dtype.
        """

        def matrix(name: str) -> Tensor:
            weight = tensors[f"{prefix}.{name}.weight"].to(torch.float64)
            bias = tensors.get(f"{prefix}.{name}.bias")
            return weight if bias is None else torch.cat([weight, bias.to(weight)[:, None]], 1)

        layout, prefix = self.layouts(config)[layer], self.attention_path(layer)
        check_shapes(tensors, self.tensor_shapes(config, layer))
        heads, rank, nope = layout.num_attention_heads, layout.kv_lora_rank, layout.head_dim - layout.rotary_dim
        split = torch.clone if self.half_split else deepseek.half_split
        kv_a, up = matrix("kv_a_proj_with_mqa"), matrix("kv_b_proj").unflatten(0, (heads, -1))
        factored = f"{prefix}.q_b_proj.weight" in tensors
        queries = matrix("q_b_proj" if factored else "q_proj").unflatten(0, (heads, -1))
        return NormedLatent(
            layout=layout,
            kv_down=kv_a[:rank],
            norm=matrix("kv_a_layernorm"),
            k_rope=split(kv_a[rank:]),
            k_up=up[:, :nope],
            v_up=up[:, nope:],
            q_nope=queries[:, :nope],
            q_rope=split(queries[:, nope:]),
            o=tensors[f"{prefix}.o_proj.weight"].to(torch.float64).unflatten(1, (heads, -1)).transpose(0, 1),
            q_down=matrix("q_a_proj") if factored else None,
            q_norm=matrix("q_a_layernorm") if factored else None,
            eps=deepseek.NORM_EPS,
        )

    def write_normed(self, layer: int, weights: NormedLatent) -> dict[str, Tensor]:
        """Return the tensors of a layer that `read_normed` reads, without the first factor of its queries.

        Args:
            layer: index of the decoder layer.
            weights: of the layer.
        """
        join, hidden = (torch.clone if self.half_split else deepseek.interleave), weights.hidden_size
        kv_a = torch.cat([weights.kv_down, join(weights.k_rope)])
        queries = torch.cat([weights.q_nope, join(weights.q_rope)], 1).flatten(0, 1)
        tensors = {
            "kv_a_proj_with_mqa.weight": kv_a[:, :hidden],
            "kv_a_layernorm.weight": weights.norm,
            "kv_b_proj.weight": torch.cat([weights.k_up, weights.v_up], 1).flatten(0, 1),
            "o_proj.weight": weights.o.transpose(0, 1).flatten(1),
            f"{'q_proj' if weights.q_down is None else 'q_b_proj'}.weight": queries,
        }
        if kv_a.shape[1] > hidden:
            tensors["kv_a_proj_with_mqa.bias"] = kv_a[:, hidden]
        return {f"{self.attention_path(layer)}.{name}": tensor for name, tensor in tensors.items()}

    def attention_path(self, layer: int) -> str:
        """Return the path of a layer's attention module, which is also its prefix in the checkpoint.

        Args:
            layer: index of the decoder layer.
        """
        return f"{LAYERS.format(layer=layer)}.{ATTENTION}"

    def prefix(self, layer: int) -> str:
        """Return the beginning of the names of a layer's attention tensors, with its dot.

        Args:
            layer: index of the decoder layer.
        """
        return f"{self.attention_path(layer)}."

    def tensors(self, checkpoint: Checkpoint, layer: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read all tensors of a layer's attention.

        Args:
            checkpoint: the MLA checkpoint.
            layer: index of the decoder layer.
            device: of the tensors.

        Returns:
            Tensors by their names in the checkpoint.
        """
        return checkpoint.read_prefix(self.prefix(layer), device)


def find_attention_model(config: dict[str, Any], names: Iterable[str] = ()) -> AttentionModel:
    """Find the description of a checkpoint's attention layers.

    Args:
        config: the checkpoint's config.json.
        names: the checkpoint's tensor names, as in `find_architecture`.

    Returns:
        The names and layouts of the attention layers.

    Raises:
        HeadwiseError: the model type is unknown, or headwise cannot read this variant of it.
    """
    if is_latent(config):
        return latent_model(config)
    return find_architecture(config, names)


def is_latent(config: dict[str, Any]) -> bool:
    """Return whether a config is of a model with MLA that headwise reads.

    Args:
        config: the config.json.
    """
    model_type = config.get("model_type")
    known = isinstance(model_type, str) and model_type in load_table().latents
    return known or written_class(config) is not None


def latent_model(config: dict[str, Any]) -> LatentModel:
    """Return the attention layers of a model with MLA.

    Args:
        config: the config.json, for which `is_latent` holds.

    Raises:
        HeadwiseError: headwise cannot read this variant of the type.
    """
    model_type = str(config.get("model_type"))
    if (stock := written_class(config)) is not None:
        return LatentModel(stock.model_type, stock.auto_class, stock.indexed)
    row = load_table().latents[model_type]
    model = LatentModel(model_type, linear=False, half_split=row["half_split"])
    require_values(row["requires"], model.stock_config(config), model_type)
    return model


def context_length(config: dict[str, Any]) -> int | None:
    """Return `max_position_embeddings` of the language model's stock config; None if it has no such field.

    Args:
        config: the config.json.
    """
    length = getattr(find_attention_model(config).stock_config(config), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def reads_pairs(config: dict[str, Any]) -> bool:
    """Return whether a checkpoint is an encoder-decoder that headwise knows, which reads a source and a target.

    Args:
        config: the checkpoint's config.json.
    """
    return any(row.part == "decoder" and row.on_text for row in find_parts(config, load_table()))


def read_latent_layer(
    checkpoint: Checkpoint,
    layer: int,
    device: torch.device | str = "cpu",
    tensors: dict[str, Tensor] | None = None,
) -> tuple[LatentWeights, Tensor | None]:
    """Read one attention layer of an MLA model that headwise wrote.

    Args:
        checkpoint: the model.
        layer: index of the decoder layer.
        device: of the result.
        tensors: all of the layer's attention; None: they are read.

    Returns:
        The layer in the norm-free parametrization, float64, and its output bias (D,) or None.
    """
    model = LatentModel()
    if tensors is None:
        tensors = model.tensors(checkpoint, layer, device)
    weights = model.read_layer(checkpoint.config, layer, tensors).to_device(device)
    return weights, tensors.get(f"{model.attention_path(layer)}.o_proj.bias")
