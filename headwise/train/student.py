"""Load a folder's stock model for training (MLA norm-free), and export its stock tensors afterwards.

The stock tensors of an MLA folder hold weights near 1e-9 (mathematics, section 4a), which are too small for an
optimizer. During training the latent norm is an identity and every weight has the parent's scale. `convert` scales
the weights that write to the residual stream so that one epsilon suits all norms; they get the parent's scale too,
and the norms its epsilon. `Student.export` makes the folder's tensors again, with the code of `convert`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.kernels.patch import enable
from headwise.models import deepseek, mla_source
from headwise.models.layout import AttentionLayout, LatentWeights
from headwise.models.norm_free import from_norm_free_state, to_norm_free_module
from headwise.models.protocol import AttentionModel, find_attention_model, read_latent_layer
from headwise.models.stock import load_model, stock_config
from headwise.text.pairs import PairMarks
from headwise.train.settings import Lora, Training

# The prefix of every name in a model that peft has wrapped.
PEFT_PREFIX = "base_model.model."
# The weights outside attention that write to the residual stream of an MLA model.
RESIDUAL_WRITERS = ("model.embed_tokens.weight", ".mlp.down_proj.weight")


@dataclass(frozen=True)
class ModelFolder:
    """An opened checkpoint and the names and layouts of its stock class.

    Attributes:
        checkpoint: the files.
        stock: names and layouts of its attention layers.
    """

    checkpoint: Checkpoint
    stock: AttentionModel

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelFolder:
        """Return the folder of an opened checkpoint.

        Raises:
            HeadwiseError: the checkpoint is of an unknown type.
        """
        return cls(checkpoint, find_attention_model(checkpoint.config, checkpoint.tensors))

    @property
    def layouts(self) -> list[AttentionLayout]:
        """The layout of every attention layer."""
        return self.stock.layouts(self.checkpoint.config)

    @property
    def is_latent(self) -> bool:
        """Whether the attention layers are MLA with linear norms, which are trained without these norms."""
        return mla_source.written_class(self.checkpoint.config) is not None

    @property
    def text(self) -> Any:
        """The stock config of the language model, or of an encoder-decoder's decoder."""
        return stock_config(self.checkpoint.config).get_text_config(decoder=True)

    @property
    def pair_marks(self) -> PairMarks | None:
        """The tokens around the targets of an encoder-decoder; None for another model."""
        return PairMarks.of(self.checkpoint.config, self.text) if self.stock.reads_pairs else None

    @property
    def attention_paths(self) -> dict[int, str]:
        """The paths of the attention modules by layer; a hybrid has layers without one."""
        return {i: self.stock.attention_path(i) for i, layout in enumerate(self.layouts) if layout.attends}

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """Load the stock model with its weights.

        Args:
            dtype: of its weights.
            device: where they are loaded.
        """
        network = load_model(self.checkpoint, self.stock.auto_class, dtype, device)
        network.config.use_cache = False
        return network


def load_for_sampling(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint's stock model whole, to sample text from it.

    On a GPU it decodes with the kernels of headwise where they serve: stock attention over a static cache reads and
    copies the whole cache at every step.

    Args:
        checkpoint: the model.
        device: where it is put.
        dtype: of its weights; None: bfloat16 on a GPU, else float32.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    network = ModelFolder.of(checkpoint).load(dtype, device).eval()
    if device.type == "cuda":
        with suppress(HeadwiseError):  # a model that the kernels do not serve decodes as it is
            enable(network)
    return network


@dataclass
class Student:
    """A model in training.

    Attributes:
        folder: where it comes from.
        network: the model in float32; parameters that are not trained are frozen.
        residual_scale: factor of the folder's residual stream over this network's.
        lora: the adapters that are trained, or None.
        templates: of an MLA model, every layer's weights without their values.
    """

    folder: ModelFolder
    network: Any
    residual_scale: float = 1.0
    lora: Lora | None = None
    templates: list[LatentWeights] = field(default_factory=list)

    @classmethod
    def load(cls, folder: ModelFolder, parent: ModelFolder | None = None) -> Student:
        """Load a folder's model; `select_parameters` makes it ready for training.

        Args:
            folder: the folder.
            parent: the model that the folder was converted from, for the scale of an MLA model's residual stream.

        """
        network = folder.load(torch.float32)
        student = cls(folder, network)
        if folder.is_latent:
            student.residual_scale = _residual_scale(folder, parent)
            _unscale_residual(network, student.residual_scale)
            for layer, path in folder.attention_paths.items():
                latent, o_bias = _unit_latent(folder.checkpoint, layer)
                latent = replace(latent, o=latent.o / student.residual_scale)
                to_norm_free_module(
                    network.get_submodule(path), latent, None if o_bias is None else o_bias / student.residual_scale
                )
                student.templates.append(_without_values(latent))
        return student

    def select_parameters(self, training: Training | None) -> None:
        """Freeze the parameters that are not trained, and add adapters where the settings have them.

        Args:
            training: the settings; None: all parameters are trained.

        Raises:
            HeadwiseError: adapters need the peft package, or a linear projection in attention.
        """
        self.network.requires_grad_(training is None or training.parameters == "all")
        for path in self.folder.attention_paths.values():
            self.network.get_submodule(path).requires_grad_(True)
        if training is not None and training.lora is not None:
            self.lora = training.lora
            self.network = _with_adapters(self.network, [*self.folder.attention_paths.values()], training.lora)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained by name, tied ones once."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def base_model(self) -> Any:
        """The transformers model, without adapters around it."""
        return self.network.get_base_model() if self.lora else self.network

    @property
    def attention_paths(self) -> list[str]:
        """The paths of the attention modules in `network`."""
        return [f"{PEFT_PREFIX * (self.lora is not None)}{path}" for path in self.folder.attention_paths.values()]

    def attention_parameters(self) -> list[str]:
        """Return the names of all parameters of the attention modules."""
        prefixes = tuple(f"{path}." for path in self.attention_paths)
        return [name for name, _ in self.network.named_parameters() if name.startswith(prefixes)]

    def release_memory(self) -> None:
        """Free the memory of the weights; the names stay."""
        if not any(hasattr(p, "full_tensor") for p in self.network.parameters()):
            self.network.to("meta")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def export(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the folder's tensors by name, in the folder's precision, from the network's.

        Args:
            state: the network's whole state dict, on the CPU.

        Yields:
            Name and tensor.

        Raises:
            HeadwiseError: the folder has no tensor for one that was trained.
        """
        state = _merge_adapters(state, self.lora)
        entries = self.folder.checkpoint.tensors
        for layer, template in enumerate(self.templates):
            prefix = self.folder.attention_paths[layer]
            yield from self._export_latent(state, f"{prefix}.", template)
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}
        if not self.templates:
            from transformers.core_model_loading import revert_weight_conversion

            state = revert_weight_conversion(self.base_model, state)
        tied = set(getattr(self.base_model, "all_tied_weights_keys", None) or {})
        for name, tensor in state.items():
            if name in entries:
                if self.templates and name.endswith(RESIDUAL_WRITERS):
                    tensor = tensor.double() * self.residual_scale
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
        learned, o_bias = from_norm_free_state(state, template, prefix)
        tensors = deepseek.attention_tensors(
            learned,
            prefix.rstrip("."),
            residual=self.residual_scale,
            o_bias=o_bias,
            q_lora_rank=checkpoint.config.get("q_lora_rank"),
            rms=1.0,
            dtype=torch.float64,
        )
        for name, tensor in tensors.items():
            yield name, tensor.to(checkpoint.tensors[name].dtype)

    def scales(self, teacher: ModelFolder) -> tuple[float, float]:
        """Return the scale of this model's residual stream, and of its attention outputs, over the teacher's.

        Args:
            teacher: the parent's folder.
        """
        if not self.folder.is_latent or teacher.is_latent:
            return 1.0, 1.0
        text = teacher.stock.text_config(teacher.checkpoint.config)
        stream = _residual_scale(self.folder, teacher)
        outputs = mla_source.find_mla_source(text).factors["residual"]
        return stream / self.residual_scale, outputs / self.residual_scale


def _residual_scale(folder: ModelFolder, parent: ModelFolder | None) -> float:
    """Return the scale of an MLA folder's residual stream over its parent's."""
    if not folder.is_latent or parent is None or parent.is_latent:
        return 1.0
    text = parent.stock.text_config(parent.checkpoint.config)
    return deepseek.residual_scale(text.get("rms_norm_eps", deepseek.NORM_EPS))


@torch.no_grad()
def _unscale_residual(network: Any, scale: float) -> None:
    """Divide the residual stream by `scale`, and the epsilon of the norms by its square: logits stay the same."""
    for name, parameter in network.named_parameters():
        if name.endswith(RESIDUAL_WRITERS):
            parameter.div_(scale)
    for module in network.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon /= scale**2


def _unit_latent(checkpoint: Checkpoint, layer: int) -> tuple[LatentWeights, Tensor | None]:
    """Return a layer in the norm-free parametrization whose latent has unit size, and its output bias.

    One step size then suits the projections on both sides of the latent.
    """
    latent, o_bias = read_latent_layer(checkpoint, layer)
    size = deepseek.unscaled_latent_rms()
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


def _merge_adapters(state: Mapping[str, Tensor], lora: Lora | None) -> dict[str, Tensor]:
    """Return the state with its adapters merged: W + alpha / rank B A (Hu et al. 2021, arXiv 2106.09685).

    Not by peft's `merge_and_unload`: checkpoints are exported while the adapters are in training, and under FSDP2
    only the gathered state dict has whole weights.
    """
    if lora is None:
        return dict(state)
    merged = {}
    for name, tensor in state.items():
        plain = name.removeprefix(PEFT_PREFIX)
        if ".lora_" in plain:
            continue
        if plain.endswith(".base_layer.weight"):
            place = name.removesuffix("base_layer.weight")
            down, up = (state[f"{place}lora_{side}.default.weight"].double() for side in "AB")
            tensor = (tensor.double() + lora.alpha / lora.rank * (up @ down)).to(tensor.dtype)
        merged[plain.replace(".base_layer.", ".")] = tensor
    return merged
