"""The model that is trained: a folder's stock model (MLA in natural coordinates), and the way back to its file.

The stock tensors of an MLA folder hold weights near 1e-9 (mathematics, section 4a), which no optimizer survives:
while it is trained its latent norm is an identity and every weight has its natural size. So have the weights that
write to the residual stream, which `convert` scales so that one epsilon suits all norms: they get their parent's
size, and the norms its epsilon. `Student.export` gives the folder's own tensors again, by the same code that
`convert` writes them with.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models import deepseek, mla_source
from headwise.models.architecture import Architecture, find
from headwise.models.layout import AttentionLayout, LatentWeights
from headwise.models.norm_free import ATTENTION, from_natural, make_natural
from headwise.models.protocol import LatentModel
from headwise.models.stock import stock_config
from headwise.recipes.settings import Lora, Training

# What peft puts before every name of the model that it wraps.
ADAPTED = "base_model.model."
# Outside attention, what an MLA model writes to its residual stream with.
WRITERS = ("model.embed_tokens.weight", ".mlp.down_proj.weight")


@dataclass(frozen=True)
class ModelFolder:
    """An opened checkpoint and where things are in its stock class."""

    checkpoint: Checkpoint
    stock: Architecture | LatentModel

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelFolder:
        if "kv_lora_rank" in checkpoint.config:
            return cls(checkpoint, LatentModel.of(checkpoint.config))
        return cls(checkpoint, find(checkpoint.config, checkpoint.tensors))

    @property
    def latent(self) -> LatentModel | None:
        return self.stock if isinstance(self.stock, LatentModel) else None

    @property
    def layouts(self) -> list[AttentionLayout]:
        if isinstance(self.stock, LatentModel):
            return self.stock.layouts
        return self.stock.layouts(self.checkpoint.config)

    @property
    def text(self) -> Any:
        """The stock config of the language model."""
        return stock_config(self.checkpoint.config).get_text_config()

    @property
    def attention(self) -> list[str]:
        """The path of every layer's attention module."""
        name = ATTENTION if isinstance(self.stock, LatentModel) else self.stock.attention
        return [f"{self.stock.module.format(layer=i)}.{name}" for i in range(len(self.layouts))]

    def load(self, dtype: torch.dtype) -> Any:
        """The stock model with its weights, on the CPU."""
        # Only the eager form knows soft-capped scores.
        capped = {"attn_implementation": "eager"} if getattr(self.text, "attn_logit_softcapping", None) else {}
        network = getattr(transformers, self.stock.auto_class).from_pretrained(
            self.checkpoint.folder, dtype=dtype, trust_remote_code=False, **capped
        )
        network.config.use_cache = False
        return network


@dataclass
class Student:
    """A model in training.

    Attributes:
        network: float32; what is not to be trained is frozen.
        stream: what the folder's residual stream is a multiple of this network's by.
        templates: of an MLA model, every layer's weights without their values.
    """

    folder: ModelFolder
    network: Any
    stream: float = 1.0
    lora: Lora | None = None
    templates: list[LatentWeights] = field(default_factory=list)

    @classmethod
    def load(cls, folder: ModelFolder, parent: ModelFolder | None = None) -> Student:
        """The folder's model, whole; `choose` makes it ready for training.

        Args:
            parent: what it was converted from, for the size of an MLA model's residual stream.

        Raises:
            HeadwiseError: the folder holds an MLA model that headwise did not write.
        """
        network = folder.load(torch.float32)
        student = cls(folder, network)
        if folder.latent is not None:
            student.stream = _stream_scale(folder, parent)
            _scale_stream(network, student.stream)
            for layer, path in enumerate(folder.attention):
                latent, o_bias = _unit_latent(folder.latent, folder.checkpoint, layer)
                latent = replace(latent, o=latent.o / student.stream)
                make_natural(
                    network.get_submodule(path), latent, None if o_bias is None else o_bias / student.stream
                )
                student.templates.append(_without_values(latent))
        return student

    def choose(self, training: Training | None) -> None:
        """Decide which parameters are trained."""
        self.network.requires_grad_(training is None or training.parameters == "all")
        for path in self.folder.attention:
            self.network.get_submodule(path).requires_grad_(True)
        if training is not None and training.lora is not None:
            self.lora = training.lora
            self.network = _with_adapters(self.network, self.folder.attention, training.lora)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, tied ones once."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def bare(self) -> Any:
        """The transformers model, without adapters around it."""
        return self.network.get_base_model() if self.lora else self.network

    @property
    def attention(self) -> list[str]:
        """The paths of the attention modules in `network`."""
        return [f"{ADAPTED * (self.lora is not None)}{path}" for path in self.folder.attention]

    def attention_parameters(self) -> list[str]:
        """Names of all parameters of the attention modules."""
        prefixes = tuple(f"{path}." for path in self.attention)
        return [name for name, _ in self.network.named_parameters() if name.startswith(prefixes)]

    def free(self) -> None:
        """Let go of the weights' memory; the names stay."""
        if not any(hasattr(p, "full_tensor") for p in self.network.parameters()):
            self.network.to("meta")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def export(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The folder's tensors, by name and in the folder's precision, from the network's.

        Args:
            state: the network's whole state dict, on the CPU.

        Raises:
            HeadwiseError: the folder has no tensor for one that was trained.
        """
        state = _merged(state, self.lora)
        entries = self.folder.checkpoint.tensors
        for layer, template in enumerate(self.templates):
            prefix = self.folder.attention[layer]
            yield from self._export_latent(state, f"{prefix}.", template)
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}
        if not self.templates:
            from transformers.core_model_loading import revert_weight_conversion

            state = revert_weight_conversion(self.bare, state)
        tied = set(getattr(self.bare, "all_tied_weights_keys", None) or {})
        for name, tensor in state.items():
            if name in entries:
                if self.templates and name.endswith(WRITERS):
                    tensor = tensor.double() * self.stream
                yield name, tensor.detach().to("cpu", entries[name].dtype).contiguous()
            elif name not in tied:
                raise HeadwiseError(
                    f"{self.folder.checkpoint.source} has no tensor {name}, so it cannot be written back.",
                    "The folder was written by a tool that names this model's tensors in another way.",
                )

    def _export_latent(
        self, state: Mapping[str, Tensor], prefix: str, template: LatentWeights
    ) -> Iterator[tuple[str, Tensor]]:
        checkpoint = self.folder.checkpoint
        learned, o_bias = from_natural(state, template, prefix)
        tensors = deepseek.attention_tensors(
            learned,
            prefix.rstrip("."),
            residual=self.stream,
            o_bias=o_bias,
            q_lora_rank=checkpoint.config.get("q_lora_rank"),
            rms=1.0,
            dtype=torch.float64,
        )
        for name, tensor in tensors.items():
            yield name, tensor.to(checkpoint.tensors[name].dtype)

    def scales(self, teacher: ModelFolder) -> tuple[float, float]:
        """What this model's residual stream, and its attention's outputs, are multiples of the teacher's by."""
        if self.folder.latent is None or teacher.latent is not None:
            return 1.0, 1.0
        assert isinstance(teacher.stock, Architecture)
        text = teacher.stock.text_config(teacher.checkpoint.config)
        whole = _stream_scale(self.folder, teacher)
        return whole / self.stream, mla_source.find(text).factors["residual"] / self.stream


def _stream_scale(folder: ModelFolder, parent: ModelFolder | None) -> float:
    """What an MLA folder's residual stream is a multiple of its parent's by."""
    if folder.latent is None or parent is None or not isinstance(parent.stock, Architecture):
        return 1.0
    text = parent.stock.text_config(parent.checkpoint.config)
    return deepseek.residual_scale(text.get("rms_norm_eps", deepseek.NORM_EPS))


@torch.no_grad()
def _scale_stream(network: Any, scale: float) -> None:
    """Divide what is written to the residual stream by `scale`, and let the norms not notice."""
    for name, parameter in network.named_parameters():
        if name.endswith(WRITERS):
            parameter.div_(scale)
    for module in network.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon /= scale**2


def _unit_latent(model: LatentModel, checkpoint: Checkpoint, layer: int) -> tuple[LatentWeights, Tensor | None]:
    """A layer in natural coordinates whose latent has unit size, as `convert` measured it, and its output bias.

    One step size then suits the projections on both sides of the latent.
    """
    latent, o_bias = model.weights(checkpoint, layer)
    size = deepseek.natural_rms()
    latent = replace(latent, kv_down=latent.kv_down / size, k_up=latent.k_up * size, v_up=latent.v_up * size)
    if checkpoint.config.get("q_lora_rank") is None and latent.kv_down.shape[1] > latent.hidden_size:
        # An output bias alone: the stock class then has a zero bias on the latent and none on the queries.
        plain = {name: getattr(latent, name)[..., :-1] for name in ("q_nope", "q_rope", "kv_down", "k_rope")}
        latent = replace(latent, **plain)
    return latent, o_bias


def _without_values(latent: LatentWeights) -> LatentWeights:
    names = ("q_nope", "q_rope", "kv_down", "k_rope", "k_up", "v_up", "o")
    return replace(latent, **{name: getattr(latent, name).to("meta") for name in names})


def _with_adapters(network: Any, paths: list[str], lora: Lora) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise HeadwiseError("train.lora needs the peft package.", "pip install 'headwise[train]'") from None
    linear = [
        f"{path}.{name}"
        for path in paths
        for name, module in network.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not linear:
        raise HeadwiseError("train.lora finds no linear projection in this model's attention.")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear)
    return get_peft_model(network, config)


def _merged(state: Mapping[str, Tensor], lora: Lora | None) -> dict[str, Tensor]:
    """The state with its adapters multiplied out: W + alpha / rank B A (Hu et al. 2021, arXiv 2106.09685)."""
    if lora is None:
        return dict(state)
    merged = {}
    for name, tensor in state.items():
        plain = name.removeprefix(ADAPTED)
        if ".lora_" in plain:
            continue
        if plain.endswith(".base_layer.weight"):
            place = name.removesuffix("base_layer.weight")
            down, up = (state[f"{place}lora_{side}.default.weight"].double() for side in "AB")
            tensor = (tensor.double() + lora.alpha / lora.rank * (up @ down)).to(tensor.dtype)
        merged[plain.replace(".base_layer.", ".")] = tensor
    return merged
