"""The exact way back: MLA with linear norms, as headwise writes it, becomes heads of a stock class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from headwise.convert.base import NONE_SCALED, Refittable
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models import deepseek
from headwise.models.architecture import find_architecture
from headwise.models.config import dtype_of
from headwise.models.layout import AttentionLayout, LatentWeights, LayerWeights
from headwise.models.mla_source import written_class
from headwise.models.protocol import LatentModel

# A dense model of this class computes what a dense DeepSeek-V3 does outside attention, tensor by tensor. Its heads
# are as wide as wanted, and RoPE turns a part of them.
HEADS_CLASS = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "use_qk_norm": False}
CARRIED = (
    *("first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group"),
    *("topk_group", "moe_intermediate_size", "routed_scaling_factor", "norm_topk_prob", "rms_norm_eps"),
    *("attention_bias", "attention_dropout", "tie_word_embeddings", "rope_theta"),
)


@dataclass(frozen=True)
class ExactReport:
    """Nothing is lost."""

    key_error: float = 0.0
    value_error: float = 0.0


def expand_latent(latent: LatentWeights) -> LayerWeights:
    """Return the heads that an MLA layer expands its latent to: one KV head for each query head.

    Args:
        latent: the layer, without norms.

    Returns:
        Keys of the rotary rows, which all heads share, and of the position-free rows; values padded with zeros.
    """
    heads, width = latent.q_nope.shape[0], latent.q_nope.shape[1] + latent.q_rope.shape[1]
    missing = width - latent.v_up.shape[1]
    return LayerWeights(
        layout=AttentionLayout(heads, heads, width, width, latent.q_rope.shape[1]),
        q=torch.cat([latent.q_rope, latent.q_nope], 1),
        k=torch.cat([latent.k_rope.expand(heads, -1, -1), latent.k_up @ latent.kv_down], 1),
        v=pad(latent.v_up @ latent.kv_down, (0, 0, 0, missing)),
        o=pad(latent.o, (0, missing)),
    )


def expands(config: dict[str, Any]) -> bool:
    """Return whether a model with MLA can become heads exactly: dense, with linear norms, as headwise writes it.

    Args:
        config: the config.json.
    """
    stock = written_class(config)
    return stock is not None and not stock.marks and not stock.indexed


def plan_heads(config: dict[str, Any], model: LatentModel, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of the stock class with heads that a model with MLA expands to.

    Args:
        config: the config.json of the model, for which `expands` holds.
        model: its attention layers.
        dtype: of the output.

    Raises:
        HeadwiseError: values are wider than keys.
    """
    layout = model.layouts(config)[0]
    if layout.v_head_dim > layout.head_dim:
        raise HeadwiseError(
            f"config.json has v_head_dim: {layout.v_head_dim}, and queries of {layout.head_dim} elements; the "
            "stock class with heads has one width for both.",
            "Give `to` mla for a smaller cache.",
        )
    rope = config.get("rope_parameters") or model.stock_config(config).rope_parameters
    return _heads_config(config | {"rope_parameters": rope}, layout, str(dtype).removeprefix("torch."))


class HeadsTarget:
    """A dense Glm4Moe whose every query head has a KV head of its own.

    Args:
        checkpoint: a dense DeepSeek-V3 folder with linear norms.
        model: its attention layers.
        dtype: of the output; None: the source's.

    Raises:
        HeadwiseError: values are wider than keys, or an output projection has a bias.
    """

    exact = True
    calibrated = fitted = regresses_norms = False
    scaled = NONE_SCALED

    def __init__(self, checkpoint: Checkpoint, model: LatentModel, *, dtype: torch.dtype | None = None) -> None:
        self.source, self.parent_config, self._model = checkpoint, checkpoint.config, model
        self.dtype = dtype or dtype_of(checkpoint.config)
        self._before = model.layouts(checkpoint.config)
        self.config = plan_heads(checkpoint.config, model, self.dtype)
        refuse_output_biases(checkpoint, model)
        self._arch = find_architecture(self.config)
        self.auto_class, self.layouts = self._arch.auto_class, self._arch.layouts(self.config)
        self.notes = [
            "Every head gets the keys and values that the latent expands to: the cache grows from "
            f"{self._before[0].cache_elements_per_token:,} to {self.layouts[0].cache_elements_per_token:,} "
            "elements per token and layer.",
            "The stock class is Glm4MoeForCausalLM, dense in every layer: its MLP is DeepSeek's, and RoPE turns a "
            "part of its heads.",
        ]
        self.warnings: list[str] = []
        self.outputs = list(self._plan_outputs())
        self._dtypes = {tensor.name: tensor.dtype for tensor in self.outputs}

    def _plan_outputs(self) -> list[OutputTensor]:
        outputs: list[OutputTensor] = []
        owner: dict[str, int] = {}
        for layer in range(len(self.layouts)):
            owner |= dict.fromkeys(self._model.tensor_names(self.parent_config, layer), layer)
        written: set[int] = set()
        for name, entry in self.source.tensors.items():
            if name not in owner:
                outputs.append(
                    OutputTensor(name, self.dtype, entry.shape, name if entry.dtype == self.dtype else None)
                )
            elif (layer := owner[name]) not in written:
                written.add(layer)
                shapes = self._arch.tensor_shapes(self.config, layer)
                outputs += [OutputTensor(each, self.dtype, shape) for each, shape in shapes.items()]
        return outputs

    def explain(self, name: str) -> str:
        """See `Target`."""
        if name not in self._dtypes:
            return "held by the heads"
        return "heads, from the latent" if ".self_attn." in name else "another dtype"

    def converted_names(self, layer: int) -> tuple[str, ...]:
        """See `Target`."""
        return self._arch.tensor_names(self.config, layer)

    def convert_layer(
        self, layer: int, weights: LatentWeights, record: LayerRecord | None
    ) -> tuple[LayerWeights, dict[str, Any]]:
        """See `Target`."""
        return expand_latent(weights), asdict(ExactReport())

    def export_layer(self, layer: int, converted: LayerWeights, record: LayerRecord | None) -> dict[str, Tensor]:
        """See `Target`."""
        tensors = self._arch.write_layer(self.config, layer, converted, self.dtype)
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def trainable_layer(self, layer: int, converted: Any, device: torch.device, length: int) -> Refittable:
        """Raise NotImplementedError: an exact conversion leaves nothing to refit."""
        raise NotImplementedError

    def transform_other(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """See `Target`."""
        return checkpoint.read(name).to(self._dtypes[name])


def refuse_output_biases(checkpoint: Checkpoint, model: LatentModel) -> None:
    """Refuse biases of output projections, which the stock class with heads has not.

    Args:
        checkpoint: the model; only these biases are read.
        model: its attention layers.

    Raises:
        HeadwiseError: a bias is not zero.
    """
    for layer in range(len(model.layouts(checkpoint.config))):
        name = f"{model.attention_path(layer)}.o_proj.bias"
        if name in checkpoint.tensors and bool(checkpoint.read(name).any()):
            raise HeadwiseError(
                f"Tensor {name} is not zero, and the output projection of the stock class with heads has no bias.",
                "Give `to` mla for a smaller cache.",
            )


def _heads_config(source: Mapping[str, Any], layout: AttentionLayout, dtype: str) -> dict[str, Any]:
    rope = dict(source["rope_parameters"])
    rope["partial_rotary_factor"] = deepseek.exact_share(layout.rotary_dim, layout.head_dim)
    return {
        **HEADS_CLASS,
        **{key: source[key] for key in (*deepseek.COPIED_CONFIG_KEYS, *CARRIED) if key in source},
        "dtype": dtype,
        "torch_dtype": dtype,
        "head_dim": layout.head_dim,
        "num_key_value_heads": layout.num_attention_heads,
        "rope_parameters": rope,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "num_nextn_predict_layers": 0,
    }
