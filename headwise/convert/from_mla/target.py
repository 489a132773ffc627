"""The target of a model that has MLA: the same stock class with a smaller cache (mathematics, section 4g)."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import NONE_SCALED, Refittable
from headwise.convert.calibration.attention_stats import first_position
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.from_mla.reduction import LatentStatistics, reduce_latent
from headwise.convert.plan import grouped_outputs
from headwise.convert.settings import ConvertSettings
from headwise.errors import SettingError
from headwise.io.reader import Checkpoint
from headwise.models.config import CODE_KEYS
from headwise.models.layout import NormedLatent
from headwise.models.protocol import LatentModel
from headwise.models.rope import rope_type
from headwise.models.stock import empty_model, layer_arguments, load_into, move_to_device

# What the converted tensors hold, for the plan.
EXPLAINED = {
    "kv_a_proj_with_mqa": "latent of lower rank, rotary key",
    "kv_a_layernorm": "norm of the new latent",
    "kv_b_proj": "keys and values, from the new latent",
    "q_proj": "rotary rows of the new key",
    "q_b_proj": "rotary rows of the new key",
    "o_proj": "solved on text",
}
# Settings that make MLA from heads.
OF_HEADS = ("exact", "pad_values", "cache_dtype")


class ReducedTarget:
    """The same stock class with a latent of lower rank or a narrower rotary key. Norms, and queries, stay.

    Args:
        checkpoint: the source.
        arch: its attention layers.
        settings: the shape.
        dtype: of the output; None: that of each tensor.

    Raises:
        SettingError: the model cannot have the shape, or a setting does not apply to it.
    """

    calibrated = fitted = True
    exact = regresses_norms = False
    scaled = NONE_SCALED

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: LatentModel,
        settings: ConvertSettings,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source, self.arch, self.auto_class = checkpoint, arch, arch.auto_class
        self._before = arch.layouts(checkpoint.config)
        stock = arch.stock_config(checkpoint.config)
        self.notes: list[str] = []
        self.warnings: list[str] = []
        rank, rope_dim = self._choose_shape(settings, stock.rope_parameters)
        self.config = reduced_config(checkpoint.config, arch, rank, rope_dim)
        if dtype is not None:
            self.config["dtype"] = self.config["torch_dtype"] = str(dtype).removeprefix("torch.")
        self.parent_config = checkpoint.config
        self.layouts = arch.layouts(self.config)
        self._theta = float(stock.rope_parameters["rope_theta"])
        self._queries_change = rope_dim != self._before[0].rotary_dim
        self._computed = {name for layer in range(len(self.layouts)) for name in self.converted_names(layer)}
        self.outputs = grouped_outputs(checkpoint, arch, self.config, dtype=dtype, computed=self._computed)
        self._dtypes = {tensor.name: tensor.dtype for tensor in self.outputs}
        if self._queries_change:
            self.warnings.append(
                f"The rotary key gets {rope_dim} elements in place of {self._before[0].rotary_dim}. That costs far "
                "more than a lower rank of the same cache (docs/results/mla.md)."
            )
        self.notes.append(
            "The latent keeps its norm. Its rows are chosen so that the new mean square estimates the old one. "
            + (
                "Queries get the rows of the new rotary key."
                if self._queries_change
                else "Queries are carried over."
            )
        )

    def explain(self, name: str) -> str:
        """See `Target`."""
        part = name.rpartition(".")[0].rpartition(".")[2]
        return EXPLAINED.get(part, "another dtype") if name in self._computed else "another dtype"

    def converted_names(self, layer: int) -> tuple[str, ...]:
        """See `Target`."""
        kept = ("q_a_proj", "q_a_layernorm") + (() if self._queries_change else ("q_proj", "q_b_proj"))
        names = self.arch.tensor_names(self.config, layer)
        return tuple(n for n in names if n.split(".")[-2] not in kept and not n.endswith("o_proj.bias"))

    def convert_layer(
        self, layer: int, weights: Any, record: LayerRecord | None
    ) -> tuple[NormedLatent, dict[str, Any]]:
        """See `Target`."""
        device = weights.o.device
        names = self.arch.tensor_names(self.parent_config, layer)
        tensors = {name: self.source.read(name) for name in names}
        latent = self.arch.read_normed(self.parent_config, layer, tensors).to_device(device)
        layout = self.layouts[layer]
        module = empty_model(self.parent_config, self.auto_class).get_submodule(self.arch.attention_path(layer))
        reduced, report = reduce_latent(
            latent,
            latent_statistics(latent, record),
            layout.kv_lora_rank or 0,
            layout.rotary_dim,
            scale=float(module.scaling),
            theta=self._theta,
        )
        return reduced, asdict(report)

    def export_layer(self, layer: int, converted: NormedLatent, record: LayerRecord | None) -> dict[str, Tensor]:
        """See `Target`."""
        tensors = self.arch.write_normed(layer, converted)
        return {n: tensors[n].to(self._dtypes[n]).cpu().contiguous() for n in self.converted_names(layer)}

    def trainable_layer(self, layer: int, converted: NormedLatent, device: torch.device, length: int) -> Refittable:
        """See `Target`."""
        model = empty_model(self.config, self.auto_class)
        names, path = self.converted_names(layer), self.arch.attention_path(layer)
        new = self.arch.write_normed(layer, converted)
        prefix = f"{path}."
        kept = {n: self.source.read(n) for n in self.source.tensors if n.startswith(prefix) and n not in names}
        load_into(model, kept | {name: new[name].to(torch.float32) for name in names}, device)
        attention = model.get_submodule(path).to(device)
        arguments = layer_arguments(model, self.arch.module, length, torch.float32)[layer]
        own = {prefix + name: p for name, p in attention.named_parameters()}
        # A linear norm has weights near 1e-9 before it, which no optimizer keeps.
        fixed = ("kv_a_layernorm", "kv_a_proj_with_mqa") if self.arch.linear else ("kv_a_layernorm",)
        free = [own[name] for name in names if name.split(".")[-2] not in fixed]

        def export(record: LayerRecord) -> dict[str, Tensor]:
            return {name: own[name].detach().to("cpu", self._dtypes[name]) for name in names}

        return Refittable(attention, attention.o_proj, free, export, move_to_device(arguments, device))

    def transform_other(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """See `Target`."""
        return checkpoint.read(name).to(self._dtypes[name])

    def _choose_shape(self, settings: ConvertSettings, rope_parameters: dict[str, Any]) -> tuple[int, int]:
        """Choose the rank and the width of the rotary key by the settings, and check them."""
        layout = self._before[0]
        whole, width = layout.kv_lora_rank or 0, layout.rotary_dim
        rank, rope_dim = settings.rank, settings.rope_dim
        if settings.cache is not None:
            size = round(settings.cache * (whole + width))
            rank, rope_dim = size - width, width
            if not 0 < rank < whole:
                raise SettingError(
                    "cache",
                    f"`cache` {settings.cache:.4g} leaves {size} elements per token and layer, of which the rotary "
                    f"key takes {width}; the model caches {whole} + {width}.",
                    "Give another share, or `rank` and `rope_dim`.",
                )
        assert rank is not None and rope_dim is not None  # ConvertSettings needs one of the three
        if not 0 < rank <= whole or (rank, rope_dim) == (whole, width):
            raise SettingError(
                "rank",
                f"`rank` {rank} with `rope_dim` {rope_dim} makes no smaller cache: the model caches {whole} + "
                f"{width} elements per token and layer.",
                f"Give a rank below {whole}, or a `rope_dim` below {width}.",
            )
        plain = rope_type(rope_parameters) == "default"
        if rope_dim != width and (not plain or rope_dim < 2 or rope_dim % 2 or width % rope_dim):
            widths = [n for n in range(2, width, 2) if width % n == 0]
            raise SettingError(
                "rope_dim",
                f"`rope_dim` {rope_dim} is not possible: "
                + (
                    f"the frequencies of the stock class for it are among the model's only for a width of {width} "
                    f"divided by a whole number ({', '.join(map(str, widths))})."
                    if plain
                    else f"{rope_type(rope_parameters)} frequencies of another width are not among the model's."
                ),
                f"Give {width}.",
            )
        return rank, rope_dim


def reduced_config(config: dict[str, Any], model: LatentModel, rank: int, rope_dim: int) -> dict[str, Any]:
    """Return the config.json of the same stock class with another latent.

    Args:
        config: the config.json of the model.
        model: its attention layers.
        rank: of the new latent.
        rope_dim: width of the new rotary key.
    """
    new = {key: copy.deepcopy(value) for key, value in config.items() if key not in CODE_KEYS}
    widths = {"head_dim": rope_dim, "qk_head_dim": model.stock_config(config).qk_nope_head_dim + rope_dim}
    new |= {"kv_lora_rank": rank, "qk_rope_head_dim": rope_dim}
    return new | {key: width for key, width in widths.items() if key in new}


def refuse_settings_of_heads(settings: ConvertSettings, source: str) -> None:
    """Raise SettingError for settings that make MLA from heads, name parts of a model, or move positions.

    Args:
        settings: of the conversion.
        source: the model with MLA.
    """
    for name in (*OF_HEADS, "context", "sliding_window", "part"):
        value = getattr(settings, name)
        if value is not None and value is not False and value != ():
            raise SettingError(
                name,
                f"`{name}` does not act on {source}, which has MLA already.",
                f"Leave out `{name}`.",
            )
    for name, usual in (("method", "optimal"), ("rope_frequencies", "default")):
        if getattr(settings, name) not in (None, usual):
            raise SettingError(
                name,
                f"`{name}` {getattr(settings, name)} makes MLA from heads, and {source} has MLA already.",
                f"Leave out `{name}`.",
            )


def latent_statistics(weights: NormedLatent, record: LayerRecord | None) -> LatentStatistics:
    """Return the statistics of a layer from its inputs, from their second moment, or from none.

    Args:
        weights: the layer, float64.
        record: what was measured; None: every direction of the input counts the same.
    """
    inputs = weights.kv_down.shape[1]
    rank = len(weights.kv_down)
    if record is not None and record.inputs is not None:
        return _from_inputs(weights, record.inputs)
    if record is None:
        moment = torch.eye(inputs, dtype=torch.float64, device=weights.o.device)
        mean_input = moment.new_zeros(inputs)
    else:
        moment, mean_input = record.moment[:inputs, :inputs], record.moment[:inputs, -1]
    latent = weights.kv_down @ moment @ weights.kv_down.T
    size = float(latent.trace()) / rank + weights.eps
    mean = weights.kv_down @ mean_input / size**0.5
    queries = torch.cat([weights.q_nope, weights.q_rope], 1)
    if weights.q_down is not None and weights.q_norm is not None:
        factor = weights.q_down @ moment @ weights.q_down.T
        factor = factor / (float(factor.trace()) / len(factor) + weights.eps)
        by_query = factor * weights.q_norm[:, None] * weights.q_norm
    else:
        by_query = moment[: queries.shape[2], : queries.shape[2]]
    return LatentStatistics(
        mean,
        latent / size - torch.outer(mean, mean),
        queries @ by_query @ queries.mT,
        weights.k_rope @ moment @ weights.k_rope.T,
    )


def _from_inputs(weights: NormedLatent, inputs: Tensor) -> LatentStatistics:
    """Return the statistics on inputs (sequences, length, D), without the first of each sequence."""
    device = weights.o.device
    queries = torch.cat([weights.q_nope, weights.q_rope], 1)
    sums: list[Tensor] = []
    count = 0
    for sequence in inputs[:, first_position(inputs.shape[1]) :]:
        x = sequence.to(device, torch.float64)
        if weights.kv_down.shape[1] > x.shape[1]:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        latent, key = weights.normed(x @ weights.kv_down.T), x @ weights.k_rope.T
        given = weights.query_inputs(x)
        new = [latent.sum(0), latent.T @ latent, given.T @ given, key.T @ key]
        sums = [old + more for old, more in zip(sums, new, strict=True)] if sums else new
        count += len(x)
    mean, moment, by_query, keys = (total / count for total in sums)
    return LatentStatistics(mean, moment - torch.outer(mean, mean), queries @ by_query @ queries.mT, keys)
