"""The MLA target: any MHA, GQA or MQA model that stock DeepSeek can express (mathematics, section 4)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import Refittable
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.mla import latent
from headwise.convert.mla.components import (
    free_frequencies,
    partial_frequencies,
    plane_norms,
    rotary_gains,
)
from headwise.convert.mla.shape import check_shape, choose_shape
from headwise.convert.positions.context import rotations
from headwise.convert.settings import ConvertSettings
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models import deepseek, mla_source, rope
from headwise.models.architecture import Architecture
from headwise.models.config import named_dtype
from headwise.models.layout import AttentionLayout, LatentWeights, LayerWeights
from headwise.models.norm_free import ATTENTION, LAYERS, from_natural, natural_attention
from headwise.models.stock import empty_model, layer_arguments
from headwise.serving import engines

# Padding for engines whose prefill wants values as wide as queries (engines.yaml).
PADDED_VALUE = 128
# Peak learning rate of the refit, relative to each weight's size.
LEARNING_RATE = 0.1
# Layers that stand for the rest when frequencies are chosen.
SAMPLED = 3


class LatentTarget:
    """A stock dense DeepseekV3 with one latent and one shared rotary key per token and layer.

    Args:
        checkpoint: the source.
        arch: its row, also of the config below.
        config: the source's config with the positions it is to have.
        settings: the shape and the method.
        dtype: of the output; None: the source's.
    """

    calibrated = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        config: dict[str, Any],
        settings: ConvertSettings,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        method, exact = settings.method or "optimal", settings.exact
        rank, rope_dim = settings.rank, settings.rope_dim
        rope_frequencies = settings.rope_frequencies or "default"
        text = arch.text_config(config)
        self.dtype = dtype or named_dtype(text.get("dtype") or text.get("torch_dtype")) or torch.bfloat16
        self.rule = mla_source.find(text, self.dtype)
        self.source, self.arch, self.parent_config = checkpoint, arch, config
        self.method = method
        # MHA2MLA's method by its choice of planes: partial-rope (by 2-norm), partial-rope-high, -low, -uniform.
        self.partial = ""
        if method.startswith("partial-rope"):
            self.partial = method.removeprefix("partial-rope").lstrip("-") or "norm"
        self.exact = exact
        self.fitted = method == "optimal" and not exact
        self.auto_class = "AutoModelForCausalLM"
        stock = arch.stock_config(config)
        before = arch.layouts(config)
        still = next((i for i, layout in enumerate(before) if not layout.rotary_dim), None)
        if method != "optimal" and still is not None and not exact:
            raise HeadwiseError(
                f"--method {method} is defined for layers that rotate their positions, and layer {still} does not.",
                "Use --method optimal.",
            )
        self._before, self._hidden = before, stock.hidden_size
        self._frequencies, factor = self._source_frequencies(config)
        scale = self.rule.attention_scale or before[0].head_dim ** -0.5
        self._scale = scale * factor**2
        self._theta = float(rotations(config, arch)[0].parameters["rope_theta"])
        self.notes: list[str] = []
        self.warnings: list[str] = []

        if exact:
            shapes = [latent.lift_shape(layout) for layout in before]
            rank, rope_dim = max(r for r, _ in shapes), max(p for _, p in shapes)
        elif settings.cache is not None:
            rank, rope_dim = choose_shape(
                before, self._hidden, settings.cache, whole_planes=bool(self.partial), notes=self.notes
            )
        assert rank is not None and rope_dim is not None  # ConvertSettings asks for one of the three
        if not exact:
            check_shape(before, self._hidden, rank, rope_dim)
        self._grid = self._choose_frequencies(rope_dim, rope_frequencies)
        scaled = rope.rope_type(rotations(config, arch)[0].parameters)
        if scaled != "default" and not (exact or self.partial) and rope_frequencies == "default":
            self.warnings.append(
                f"The source turns by {scaled} frequencies, and rotary keys on the default grid by those of its "
                f"base {self._theta:,.0f}, which only come near. --rope-frequencies free keeps the source's own."
            )

        biased = arch.has_bias(config)
        o_bias = self._o_bias_name(0) in checkpoint.tensors
        layout = latent.latent_layout(before[0], rank, rope_dim)
        self.query_rank = deepseek.query_rank(layout, self._hidden) if biased else None
        self.value_width = PADDED_VALUE if settings.pad_values and layout.v_head_dim < PADDED_VALUE else None
        # What a config leaves out is the source class's default, which need not be DeepSeek's.
        defaults = {name: getattr(stock, name) for name in ("hidden_act", "max_position_embeddings")}
        self.config = deepseek.config(
            {**defaults, **text, "intermediate_size": stock.intermediate_size, "num_hidden_layers": len(before)},
            layout,
            theta=self._theta,
            frequencies=self._grid,
            attention_bias=biased or o_bias,
            q_lora_rank=self.query_rank,
            v_head_dim=self.value_width,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        self.layouts = [latent.latent_layout(old, rank, rope_dim) for old in before]
        attention = [n for i in range(len(before)) for n in (*arch.tensor_names(config, i), self._o_bias_name(i))]
        self._carried = {c.name: c for c in mla_source.plan_other(self.rule, checkpoint.tensors, attention)}
        self._shapes = self._attention_shapes(layout, biased or o_bias)
        self.outputs = self._all_outputs()
        self.engines = [_say(engine) for engine in engines.engines(self.config)]

    def computed(self, layer: int) -> tuple[str, ...]:
        prefix = f"{LAYERS.format(layer=layer)}.{ATTENTION}"
        return tuple(f"{prefix}.{name}" for name in self._shapes)

    def convert_layer(
        self, layer: int, weights: LayerWeights, record: LayerRecord | None
    ) -> tuple[LatentWeights, dict[str, Any]]:
        own, grid = (f.to(weights.q.device) for f in (self._frequencies[layer], self._grid))
        if self.exact:
            layout = self.layouts[layer]
            made = latent.lift(
                weights,
                grid,
                scale=self._scale,
                rank=layout.kv_lora_rank,
                rope_dim=layout.qk_rope_head_dim,
            )
            return made, {"key_error": 0.0, "value_error": 0.0}
        measured: dict[str, Any] = {}
        if record is not None:
            measured = {**record.moments(), "distances": record.distances}
        made, report = latent.convert(
            weights,
            own,
            rank=self.layouts[layer].kv_lora_rank or 0,
            rope_frequencies=grid,
            scale=self._scale,
            method="partial-rope" if self.partial else self.method,
            **measured,
        )
        return made, {k: v for k, v in asdict(report).items() if k != "errors"}

    def tensors(self, layer: int, made: LatentWeights, record: LayerRecord | None) -> dict[str, Tensor]:
        return self._export(layer, made, self._o_bias(layer), record)

    def module(self, layer: int, made: LatentWeights, device: torch.device, length: int) -> Refittable:
        attention = natural_attention(self.config, layer, made, self._o_bias(layer), device)
        model = empty_model(self.config, self.auto_class)
        arguments = layer_arguments(model, LAYERS, length, torch.float32)[layer]
        parameters = [p for name, p in attention.named_parameters() if name != "o_proj.bias"]

        def export(record: LayerRecord) -> dict[str, Tensor]:
            return self._export(layer, *from_natural(attention.state_dict(), made), record)

        return Refittable(
            attention, attention.o_proj, parameters, export, to_device(arguments, device), LEARNING_RATE
        )

    def carry(self, name: str, checkpoint: Checkpoint) -> Tensor:
        carried = self._carried[name]
        return carried.apply(checkpoint.read(carried.source), self.dtype)

    def _export(
        self, layer: int, made: LatentWeights, o_bias: Tensor | None, record: LayerRecord | None
    ) -> dict[str, Tensor]:
        moment = None
        if record is not None:
            inputs = made.q_nope.shape[2]
            moment = record.moment[:inputs, :inputs].cpu()
        return deepseek.attention_tensors(
            made,
            f"{LAYERS.format(layer=layer)}.{ATTENTION}",
            residual=self.rule.factors["residual"],
            o_bias=o_bias,
            v_head_dim=self.value_width,
            q_lora_rank=self.query_rank,
            moment=moment,
            dtype=self.dtype,
        )

    def _source_frequencies(self, config: dict[str, Any]) -> tuple[list[Tensor], float]:
        """Per layer, radians per token of every plane, and the factor on queries and keys."""
        sets = rotations(config, self.arch)
        if len(sets) > 1:
            raise HeadwiseError("Layers with different rotary frequencies cannot become one MLA config.")
        kind = rope.rope_type(sets[0].parameters)
        if kind in rope.EXACT_WHEN_SHORT:
            raise HeadwiseError(
                f"{kind} frequencies change with the length of the input, and an MLA model is written for one set.",
                "Name another rule with --rope, or convert to GQA: --to gqa --groups N.",
            )
        trained = self.arch.stock_config(config).max_position_embeddings
        found, factor = rope.frequencies(sets[0].parameters, sets[0].rotary_dim, trained)
        none = found[:0]
        return [found if layout.rotary_dim else none for layout in self._before], factor

    def _choose_frequencies(self, rope_dim: int, wanted: str) -> Tensor:
        own = next(found for found in self._frequencies if len(found))
        if self.exact:
            return own.repeat(-(-rope_dim // (2 * len(own))))[: rope_dim // 2]
        if wanted == "default" and not self.partial:
            return deepseek.default_grid(self._theta, rope_dim)
        read = [self._read(i) for i in self._sample()]
        layers = [weights if weights.has_bias else latent.with_constant(weights) for weights in read]
        known = [latent.statistics(weights) for weights in layers]
        if self.partial:
            norms = torch.stack([plane_norms(w, k) for w, k in zip(layers, known, strict=True)]).sum(0)
            try:
                return partial_frequencies(own, self._before[0].num_key_value_heads, rope_dim, self.partial, norms)
            except ValueError as error:
                raise HeadwiseError(f"--method {self.method}: {error}.") from error
        gains = torch.stack([rotary_gains(w, own, k) for w, k in zip(layers, known, strict=True)]).sum(0)
        return free_frequencies(own, gains, rope_dim)

    def _attention_shapes(self, layout: AttentionLayout, biased: bool) -> dict[str, tuple[int, ...]]:
        """Name (inside the attention module) and shape of every attention tensor of a layer."""
        heads, width = layout.num_attention_heads, self._hidden
        rank, rope_dim = layout.kv_lora_rank or 0, layout.rotary_dim
        value = self.value_width or layout.v_head_dim
        nope = layout.head_dim - rope_dim
        shapes: dict[str, tuple[int, ...]] = {
            "kv_a_layernorm.weight": (rank,),
            "kv_a_proj_with_mqa.weight": (rank + rope_dim, width),
            "kv_b_proj.weight": (heads * (nope + value), rank),
            "o_proj.weight": (width, heads * value),
        }
        if biased:
            shapes |= {"kv_a_proj_with_mqa.bias": (rank + rope_dim,), "o_proj.bias": (width,)}
        if self.query_rank is None:
            return shapes | {"q_proj.weight": (heads * layout.head_dim, width)}
        shapes |= {
            "q_a_layernorm.weight": (self.query_rank,),
            "q_a_proj.weight": (self.query_rank, width),
            "q_b_proj.weight": (heads * layout.head_dim, self.query_rank),
        }
        return shapes | ({"q_a_proj.bias": (self.query_rank,)} if biased else {})

    def _all_outputs(self) -> list[OutputTensor]:
        """Carried tensors in the source's order, each layer's attention before the first of its other tensors."""
        order = {name: i for i, name in enumerate(self.source.tensors)}
        outputs = []
        written: set[str] = set()
        for carried in sorted(self._carried.values(), key=lambda c: (order[c.source], c.name)):
            prefix = carried.name.split(".mlp.")[0].split(".input_layernorm")[0].split(".post_attention")[0]
            if prefix.startswith("model.layers.") and prefix not in written:
                written.add(prefix)
                outputs += [
                    OutputTensor(f"{prefix}.{ATTENTION}.{n}", self.dtype, s, None) for n, s in self._shapes.items()
                ]
            entry = self.source.tensors[carried.source]
            plain = carried.factor == 1 and carried.part is None and entry.dtype == self.dtype
            shape = carried.shape(entry.shape)
            outputs.append(OutputTensor(carried.name, self.dtype, shape, carried.source if plain else None))
        return outputs

    def _o_bias_name(self, layer: int) -> str:
        return f"{self.arch.layers[0].format(layer=layer)}.{self.arch.attention}.{self.arch.projections['o']}.bias"

    def _o_bias(self, layer: int) -> Tensor | None:
        name = self._o_bias_name(layer)
        return self.source.read(name).double() if name in self.source.tensors else None

    def _read(self, layer: int) -> LayerWeights:
        names = self.arch.tensor_names(self.parent_config, layer)
        return self.arch.read_layer(self.parent_config, layer, {name: self.source.read(name) for name in names})

    def _sample(self) -> list[int]:
        turning = [i for i, layout in enumerate(self._before) if layout.rotary_dim]
        return sorted({turning[k * (len(turning) - 1) // (SAMPLED - 1)] for k in range(SAMPLED)})


def _say(engine: engines.Engine) -> str:
    words = {"yes": "loads", "no": "does not load", "wrong": "loads, and computes another function"}
    answer = words.get(engine.loads, "not known")
    return f"{engine.name}: {answer}" + (f" ({engine.reason})" if engine.reason else "")


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples and dictionaries, moved."""
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value
