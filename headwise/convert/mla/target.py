"""The MLA target: any MHA, GQA or MQA model that stock DeepSeek can express (mathematics, section 4).

A model with MLA is a source too: its layers stay, and indexers are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from headwise import registry
from headwise.convert.base import Refittable
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.mla.exact import exact_mla, exact_mla_shape, latent_layout
from headwise.convert.mla.features import layer_statistics, with_constant
from headwise.convert.mla.frequencies import free_frequencies, partial_frequencies, plane_norms, rotary_gains
from headwise.convert.mla.latent import approximate_mla
from headwise.convert.mla.latent_basis import balanced_basis, unit_rotary_key
from headwise.convert.mla.shape import check_shape, source_cache
from headwise.convert.mla.size_choice import shape_for_share
from headwise.convert.mla.stand_in import linear_stand_in, unit_scale
from headwise.convert.positions.context import rope_sets
from headwise.convert.settings import ConvertSettings
from headwise.convert.sparse.budget import indexer_notes, indexer_shape, indexer_tensor_shapes
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models import deepseek, mla_source, rope
from headwise.models.config import dtype_of
from headwise.models.deepseek import ATTENTION, LAYERS
from headwise.models.layout import AttentionLayout, LatentWeights, LayerWeights
from headwise.models.norm_free import from_norm_free_state, norm_free_attention
from headwise.models.protocol import AttentionModel
from headwise.models.stock import empty_model, layer_arguments, move_to_device
from headwise.serving.latent_shape import pad_layout, query_factors

# Padding for engines whose prefill needs values as wide as queries (engines.yaml).
PADDED_V_HEAD_DIM = 128
# The number of layers from which frequencies are chosen.
NUM_SAMPLED_LAYERS = 3


APPROXIMATE = (
    "Approximate: the source normalises queries and keys, which is not linear, and stock MLA has no such norm. The "
    "norms' weights are kept exactly. The scale for each token and head is replaced by a linear map."
)
# What the tensors of DeepSeek's attention hold, for the plan.
EXPLAINED = {
    "kv_a_proj_with_mqa": "latent and shared rotary key",
    "kv_a_layernorm": "a norm, made linear",
    "kv_b_proj": "keys and values, from the latent",
    "q_proj": "queries of the latent, rotary rows",
    "q_a_proj": "queries, first factor",
    "q_a_layernorm": "a norm, made linear",
    "q_b_proj": "queries, second factor",
    "o_proj": "output of the new values",
    "wq_b": "queries of the indexer",
    "wk": "key of the indexer",
    "k_norm": "a norm, made linear",
    "weights_proj": "weights of the indexer's queries",
}


class LatentTarget:
    """A stock dense DeepseekV3 with one latent and one shared rotary key per token and layer.

    Args:
        checkpoint: the source.
        arch: its row, also of the config below.
        config: the source's config with the positions of the output.
        settings: the shape and the method.
        dtype: of the output; None: the source's.

    Raises:
        HeadwiseError: stock DeepSeek cannot express the model.
        SettingError: the model cannot have the shape, or the method does not apply to it.
    """

    calibrated = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: AttentionModel,
        config: dict[str, Any],
        settings: ConvertSettings,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        text = arch.text_config(config)
        if checkpoint.headless:
            raise HeadwiseError(
                f"{checkpoint.source} is a base model without a language-model head, and an MLA folder has one.",
                "It can become GQA or MQA: `to` gqa with `groups`.",
            )
        self.dtype = dtype or dtype_of(config)
        self.rule = mla_source.find_mla_source(text, self.dtype, settings.sparse)
        self.auto_class = self.rule.stock.auto_class
        self.source, self.arch, self.parent_config = checkpoint, arch, config
        self.method, self.exact = registry.find_method("latent", settings.method or "optimal"), settings.exact
        self.fitted = not self.exact and "text" in self.method.needs
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.regresses_norms = arch.qk_norm(config) is not None
        if self.regresses_norms:
            self._check_norms(settings)
        stock = arch.stock_config(config)
        self._before, self._hidden_size = arch.layouts(config), stock.hidden_size
        self._was_latent = self._before[0].kind == "mla"
        mla_source.refuse_windows(self._before)
        self._check_rotary_layers()
        self._frequencies, factor = self._source_frequencies()
        scale = self.rule.attention_scale or self._before[0].head_dim ** -0.5
        self._scale = scale * factor**2

        parameters = rope_sets(config, arch)[0].parameters
        self._theta = float(parameters["rope_theta"])
        rank, rope_dim = self._choose_shape(settings)
        self._grid = self._choose_frequencies(rope_dim, settings.rope_frequencies or "default")
        self._warn_of_default_grid(rope.rope_type(parameters), settings.rope_frequencies or "default")

        self._rounded_cache = settings.cache_dtype == "fp8"
        if self._rounded_cache and self.exact:
            raise SettingError(
                "cache_dtype",
                "`cache_dtype` fp8 gives the latent another basis, and `exact` copies the rows of the source.",
                "Leave out one of the two.",
            )
        biased = arch.has_bias(config)
        bias = biased or self._o_bias_name(0) in checkpoint.tensors
        least = PADDED_V_HEAD_DIM if settings.pad_values else 0
        self.layouts = [
            pad_layout(latent_layout(old, rank, rope_dim), settings.engines, least) for old in self._before
        ]
        if settings.sparse:
            shape = indexer_shape(
                settings, self._before[0].num_attention_heads, rope_dim, stock.max_position_embeddings
            )
            self.layouts = [replace(each, indexer=shape) for each in self.layouts]
            self.notes += indexer_notes(shape, self._hidden_size)
        layout = self.layouts[0]
        self.q_lora_rank = query_factors(
            layout, self._hidden_size, stock.vocab_size, len(self._before), settings.engines, biased
        )
        if settings.sparse:
            self.q_lora_rank = self._hidden_size + biased
        elif not biased and self.q_lora_rank is not None:
            self.notes.append(
                "Queries are written in two factors, which llama.cpp needs at this depth. The first is a multiple "
                f"of the identity, and adds {self._hidden_size**2:,} weights per layer."
            )
        # A field that the config leaves out has the default of the source's class, which may not be DeepSeek's.
        fields, name = stock.to_dict(), str(self.dtype).removeprefix("torch.")

        def make_config(stock_class: mla_source.StockMla, layout: AttentionLayout) -> dict[str, Any]:
            return deepseek.make_config(
                fields,
                layout,
                theta=self._theta,
                frequencies=self._grid,
                attention_bias=bias,
                q_lora_rank=self.q_lora_rank,
                dtype=name,
                stock=stock_class,
                experts=self.rule.experts,
            )

        self.config = make_config(self.rule.stock, layout)
        # A layer is trained before it has an indexer.
        dense = mla_source.find_mla_source(text, self.dtype).stock
        self._dense_config = make_config(dense, replace(layout, indexer=None))
        if self.rule.stock.note:
            self.notes.append(self.rule.stock.note)
        layers = range(len(self._before))
        attention = [n for i in layers for n in (*arch.tensor_names(config, i), self._o_bias_name(i))]
        copies = mla_source.plan_scaled_copies(self.rule, checkpoint.tensors, attention)
        self.scaled: Mapping[str, mla_source.ScaledCopy] = {copy.name: copy for copy in copies}
        self._carried = {source: copy.name for copy in copies for source in copy.sources}
        self._shapes = deepseek.attention_shapes(layout, self._hidden_size, bias=bias, q_lora_rank=self.q_lora_rank)
        if layout.indexer and self.q_lora_rank:
            self._shapes |= indexer_tensor_shapes(layout.indexer, self._hidden_size, self.q_lora_rank)
        self.outputs = mla_source.plan_outputs(copies, checkpoint.tensors, self._shapes, self.dtype)
        empty = mla_source.empty_tensors(self.rule, len(self._before), self._hidden_size)
        self.outputs += [OutputTensor(name, self.dtype, shape) for name, shape in empty.items()]
        self._written = {tensor.name for tensor in self.outputs}
        self._explain_growth()

    def explain(self, name: str) -> str:
        """See `Target`."""
        copy = self.scaled.get(name)
        if copy is None:
            part = name.rpartition(".")[0].rpartition(".")[2]
            held = "held by its factors" if self._was_latent else "held by the latent"
            if name in self._carried:
                held = f"becomes {self._carried[name]}"
            return EXPLAINED.get(part, "attention of DeepSeek") if name in self._written else held
        reasons = ["experts stacked"] if copy.stack else []
        if name == mla_source.HEAD and copy.source == mla_source.EMBEDDING:
            reasons.append("a head of its own: scaled embeddings")
        if copy.part:
            reasons.append(f"part {copy.part[0] + 1} of {copy.part[1]} of {copy.source.rpartition('.weight')[0]}")
        if copy.factor != 1:
            reasons.append(f"scaled by {copy.factor:.4g}: fixed norm epsilon")
        return "; ".join(reasons) or "another dtype"

    def _explain_growth(self) -> None:
        """Note why the weights grow, and how to avoid it."""
        numbers = {tensor.name: math.prod(tensor.shape) for tensor in self.outputs}
        before = self.source.num_parameters
        grown = sum(numbers.values()) - before
        if grown <= 0 or self._was_latent:
            return
        head = numbers[mla_source.HEAD] if mla_source.HEAD not in self.source.tensors else 0
        parts = []
        if head:
            parts.append(f"{head:,} for the output head, which was tied to the embeddings and is written out")
        if grown - head > 0:
            parts.append(
                f"{grown - head:,} for attention: queries of {self.layouts[0].num_attention_heads} heads get "
                "rotary rows of their own, and kv_b_proj expands the latent for every head"
            )
        self.notes.append(
            f"The weights grow by {grown:,} parameters ({grown / before:.0%}): {'; '.join(parts)}."
            + (
                " A smaller `rank` or `rope_dim` grows them less; `to` gqa or mqa does not."
                if not self.exact
                else ""
            )
        )

    def converted_names(self, layer: int) -> tuple[str, ...]:
        """See `Target`."""
        prefix = f"{LAYERS.format(layer=layer)}.{ATTENTION}"
        return tuple(f"{prefix}.{name}" for name in self._shapes)

    def convert_layer(
        self, layer: int, weights: Any, record: LayerRecord | None
    ) -> tuple[LatentWeights, dict[str, Any]]:
        """See `Target`."""
        frequencies, grid = (f.to(weights.o.device) for f in (self._frequencies[layer], self._grid))
        layout = self.layouts[layer]
        if self.exact:
            shape = {"rank": layout.kv_lora_rank, "rope_dim": layout.qk_rope_head_dim}
            exact = weights if self._was_latent else exact_mla(weights, grid, scale=self._scale, **shape)
            return self._pad(exact, layer), {"key_error": 0.0, "value_error": 0.0}
        measured: dict[str, Any] = {}
        norms: dict[str, Any] = {}
        if record is not None:
            measured = {**record.moments(), "distances": record.distances}
        if self.regresses_norms:
            weights, norms = self._without_norms(layer, weights, record)
        converted, report = approximate_mla(
            weights,
            frequencies,
            rank=layout.kv_lora_rank or 0,
            rope_frequencies=grid,
            scale=self._scale,
            method=self.method.name,
            **measured,
        )
        return self._pad(converted, layer), {k: v for k, v in asdict(report).items() if k != "errors"} | norms

    def export_layer(self, layer: int, converted: LatentWeights, record: LayerRecord | None) -> dict[str, Tensor]:
        """See `Target`."""
        return self._export(layer, converted, self._o_bias(layer), record)

    def trainable_layer(
        self, layer: int, converted: LatentWeights, device: torch.device, length: int
    ) -> Refittable:
        """See `Target`."""
        attention = norm_free_attention(self._dense_config, layer, converted, self._o_bias(layer), device)
        model = empty_model(self._dense_config, self.auto_class)
        arguments = layer_arguments(model, LAYERS, length, torch.float32)[layer]
        parameters = [p for name, p in attention.named_parameters() if name != "o_proj.bias"]

        def export(record: LayerRecord) -> dict[str, Tensor]:
            return self._export(layer, *from_norm_free_state(attention.state_dict(), converted), record)

        return Refittable(attention, attention.o_proj, parameters, export, move_to_device(arguments, device))

    def transform_other(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """See `Target`."""
        # The shared experts of a class whose source has none.
        return torch.empty(next(t.shape for t in self.outputs if t.name == name), dtype=self.dtype)

    def _export(
        self, layer: int, converted: LatentWeights, o_bias: Tensor | None, record: LayerRecord | None
    ) -> dict[str, Tensor]:
        moment = None
        if record is not None:
            inputs = converted.q_nope.shape[2]
            moment = record.moment[:inputs, :inputs].to(converted.q_nope.device)
        if self._rounded_cache:
            converted = unit_rotary_key(balanced_basis(converted, moment), moment)
        tensors = deepseek.attention_tensors(
            converted,
            f"{LAYERS.format(layer=layer)}.{ATTENTION}",
            residual=self.rule.factors["residual"],
            o_bias=o_bias,
            q_lora_rank=self.q_lora_rank,
            moment=moment,
            # The latent of a model with MLA keeps its scale, and its tensors their values.
            rms=deepseek.unscaled_latent_rms() if self._was_latent else None,
            dtype=self.dtype,
        )
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _pad(self, converted: LatentWeights, layer: int) -> LatentWeights:
        layout = self.layouts[layer]
        return deepseek.pad_heads(converted, layout.head_dim - layout.rotary_dim, layout.v_head_dim)

    def _check_norms(self, settings: ConvertSettings) -> None:
        """Refuse what norms on queries and keys rule out, and note that the conversion is approximate."""
        if self.exact:
            raise SettingError(
                "exact",
                f"`exact` is not possible for a {self.arch.model_type} model: it normalises queries and keys, "
                "which is not linear, and stock MLA has no such norm.",
                "Give `cache`, or `rank` and `rope_dim`, for an approximate conversion.",
            )
        if settings.calibrate == "none":
            raise SettingError(
                "calibrate",
                f"`calibrate` none is not possible for MLA from a {self.arch.model_type} model: linear maps "
                "replace its norms on queries and keys, and are regressed on calibration text.",
                "Leave out `calibrate`, or name a text.",
            )
        self.warnings.append(APPROXIMATE)
        self.notes.append(
            "The variance of the norms' scales, and the error of their linear replacement, are measured in every "
            "layer during calibration; headwise.json has them, and the summary and the card their range."
        )

    def _without_norms(
        self, layer: int, weights: LayerWeights, record: LayerRecord | None
    ) -> tuple[LayerWeights, dict[str, Any]]:
        """Return a layer with linear queries and keys in place of normed ones, and the report of their error."""
        moments: dict[str, Any] = dict(record.norm_moments()) if record is not None else {}
        if record is None or record.key_moment is None or len(moments) < 4:
            raise HeadwiseError(
                f"The moments of layer {layer} hold nothing about the norms on its queries and keys.",
                "Measure them again with `save_moments`, or leave out `moments`.",
            )
        linear, report = linear_stand_in(weights, moment=record.moment, key_moment=record.key_moment, **moments)
        return linear, asdict(report)

    def _check_rotary_layers(self) -> None:
        """Raise SettingError if the method needs RoPE in every layer and a layer has none."""
        without = next((i for i, layout in enumerate(self._before) if not layout.rotary_dim), None)
        if "rope" in self.method.needs and without is not None and not self.exact:
            raise SettingError(
                "method",
                f"`method` {self.method.name} is defined for layers that rotate their positions, and layer "
                f"{without} does not.",
                "Give `method` optimal.",
            )

    def _source_frequencies(self) -> tuple[list[Tensor], float]:
        """Return the radians per token of every plane, by layer, and the factor on queries and keys."""
        sets = rope_sets(self.parent_config, self.arch)
        if len(sets) > 1:
            raise HeadwiseError(
                "Layers with different rotary frequencies cannot become one MLA config.",
                "Convert to GQA: `to` gqa with `groups`.",
            )
        kind = rope.rope_type(sets[0].parameters)
        if kind in rope.EXACT_WHEN_SHORT and not self._was_latent:
            raise HeadwiseError(
                f"{kind} frequencies change with the length of the input, and an MLA model is written for one set.",
                "Give another rule as `rope`, or convert to GQA: `to` gqa with `groups`.",
            )
        trained = self.arch.stock_config(self.parent_config).max_position_embeddings
        frequencies, factor = rope.frequencies(sets[0].parameters, sets[0].rotary_dim, trained)
        none = frequencies[:0]
        return [frequencies if layout.rotary_dim else none for layout in self._before], factor

    def _choose_shape(self, settings: ConvertSettings) -> tuple[int, int]:
        """Choose the rank and the rotary width by the settings, and check them."""
        if settings.exact:
            shapes = [exact_mla_shape(layout) for layout in self._before]
            return max(rank for rank, _ in shapes), max(rope_dim for _, rope_dim in shapes)
        rank, rope_dim = settings.rank, settings.rope_dim
        if settings.cache is not None:
            wanted = round(settings.cache * source_cache(self._before))
            rank, rope_dim = shape_for_share(
                self._before,
                self._hidden_size,
                settings.cache,
                settings.engines,
                planes=bool(self.method.planes),
                v_head_dim=PADDED_V_HEAD_DIM if settings.pad_values else 0,
            )
            if rank + rope_dim not in (wanted, wanted - 1):
                self.notes.append(
                    f"The cache has {rank + rope_dim} elements per token and layer, for which engines have "
                    f"kernels, in place of {wanted}."
                )
        assert rank is not None and rope_dim is not None  # ConvertSettings needs one of the three
        check_shape(self._before, self._hidden_size, rank, rope_dim)
        return rank, rope_dim

    def _choose_frequencies(self, rope_dim: int, grid: str) -> Tensor:
        """Choose the frequencies of the rotary key, (rope_dim / 2,) radians per token, one list for all layers."""
        source = next(frequencies for frequencies in self._frequencies if len(frequencies))
        if self.exact:
            return source.repeat(-(-rope_dim // (2 * len(source))))[: rope_dim // 2]
        if grid == "default" and not self.method.planes:
            return deepseek.default_grid(self._theta, rope_dim)
        sampled = [self._read_layer(layer) for layer in self._sampled_layers()]
        layers = [weights if weights.has_bias else with_constant(weights) for weights in sampled]
        pairs = [(weights, layer_statistics(weights)) for weights in layers]
        if self.method.planes:
            norms = torch.stack([plane_norms(*pair) for pair in pairs]).sum(0)
            groups = self._before[0].num_key_value_heads
            try:
                return partial_frequencies(source, groups, rope_dim, self.method.planes, norms)
            except ValueError as error:
                raise SettingError("rope_dim", f"`method` {self.method.name}: {error}.") from error
        gains = torch.stack([rotary_gains(weights, source, statistics) for weights, statistics in pairs]).sum(0)
        return free_frequencies(source, gains, rope_dim)

    def _warn_of_default_grid(self, rope_type: str, grid: str) -> None:
        """Warn if the source's frequencies are scaled and those of the output are not."""
        if rope_type != "default" and grid == "default" and not (self.exact or self.method.planes):
            self.warnings.append(
                f"The source rotates by {rope_type} frequencies. Rotary keys on the default grid rotate by those "
                f"of its base {self._theta:,.0f}, which only approximate them. `rope_frequencies` free keeps the "
                "source's own."
            )

    def _o_bias_name(self, layer: int) -> str:
        return f"{self.arch.layers[0].format(layer=layer)}.{self.arch.attention}.{self.arch.output_projection}.bias"

    def _o_bias(self, layer: int) -> Tensor | None:
        name = self._o_bias_name(layer)
        return self.source.read(name).double() if name in self.source.tensors else None

    def _read_layer(self, layer: int) -> LayerWeights:
        names = self.arch.tensor_names(self.parent_config, layer)
        weights = self.arch.read_layer(self.parent_config, layer, {name: self.source.read(name) for name in names})
        return unit_scale(weights)

    def _sampled_layers(self) -> list[int]:
        """Return layers with RoPE at equal distances, the first and the last included."""
        rotary = [i for i, layout in enumerate(self._before) if layout.rotary_dim]
        return sorted(
            {rotary[k * (len(rotary) - 1) // (NUM_SAMPLED_LAYERS - 1)] for k in range(NUM_SAMPLED_LAYERS)}
        )
