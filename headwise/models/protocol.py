"""Answer the same questions for grouped and for MLA models: layouts, paths and tensors of the attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models import deepseek, rope
from headwise.models.config import MAX_LAYERS, check_rope, checked_size
from headwise.models.layout import AttentionLayout, LatentWeights
from headwise.models.norm_free import ATTENTION, LAYERS

LATENT_SIZES = [
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
]


@dataclass(frozen=True)
class LatentModel:
    """Where things are in a stock DeepSeek model, as `Architecture` says it of the others."""

    config: dict[str, Any]
    auto_class: str = "AutoModelForCausalLM"
    module: str = LAYERS
    attention: str = ATTENTION
    layers: tuple[str, ...] = (LAYERS,)

    @classmethod
    def of(cls, config: dict[str, Any]) -> LatentModel:
        """Raises HeadwiseError for an MLA model that headwise did not write."""
        if not cls.wrote(config):
            raise HeadwiseError(
                f"The folder holds a {config.get('model_type')} model with experts or another latent attention, "
                "which headwise does not write.",
                "verify checks folders that headwise converted.",
            )
        return cls(config)

    @staticmethod
    def wrote(config: dict[str, Any]) -> bool:
        """Whether this is the dense stock DeepSeek that headwise makes."""
        dense = config.get("first_k_dense_replace") == config.get("num_hidden_layers")
        named = isinstance(config.get("model_type"), str)
        return config.get("architectures") == deepseek.ARCHITECTURES and dense and named

    @property
    def layouts(self) -> list[AttentionLayout]:
        sizes = [checked_size(self.config, name) for name in LATENT_SIZES]
        layers, heads, rank, rope_dim, nope_dim, v_dim = sizes
        if not 0 < layers <= MAX_LAYERS:
            raise HeadwiseError(f"config.json has num_hidden_layers: {layers}, and 1 to {MAX_LAYERS} are possible.")
        check_rope(self.config.get("rope_parameters"))
        return [AttentionLayout(heads, heads, nope_dim + rope_dim, v_dim, rope_dim, None, rank, rope_dim)] * layers

    def prefix(self, layer: int) -> str:
        return f"{LAYERS.format(layer=layer)}.{ATTENTION}"

    def tensors(self, checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
        """Everything of a layer's attention."""
        prefix = self.prefix(layer) + "."
        return {name: checkpoint.read(name) for name in checkpoint.tensors if name.startswith(prefix)}

    def weights(self, checkpoint: Checkpoint, layer: int) -> tuple[LatentWeights, Tensor | None]:
        """A layer in natural coordinates, and its output bias."""
        tensors = self.tensors(checkpoint, layer)
        c = self.config
        frequencies, _ = rope.frequencies(c["rope_parameters"], c["qk_rope_head_dim"], c["max_position_embeddings"])
        bias = tensors.get(f"{self.prefix(layer)}.o_proj.bias")
        return deepseek.read_attention(tensors, self.prefix(layer), c, frequencies), bias
