"""What a conversion makes: the new config, the tensors of the output, and how one layer becomes another.

`pipeline.py` carries out any `Target` in the same way: stream the parent if something must be measured, convert
layer by layer, copy the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import Refittable
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.gqa.merge import POOLS, merge, neighbours, pool
from headwise.convert.plan import SAME_ARCHITECTURE, grouped_outputs
from headwise.convert.settings import ConvertSettings
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture, find
from headwise.models.layout import AttentionLayout, LayerWeights
from headwise.models.stock import empty_model, load_into


class GroupedTarget:
    """The same architecture with another number of key-value heads (or none changed: `groups` is None).

    Repeating heads and pooling neighbours leave queries and outputs as they are. Unless something is `measured`
    on the layers, such keys and values are carried, one tensor at a time, and everything else is copied.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        config: dict[str, Any],
        parent_config: dict[str, Any],
        settings: ConvertSettings,
        *,
        groups: int | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # A window may have turned the model into another type of the same tensors.
        self.source, self.arch, self.config = checkpoint, find(config, checkpoint.tensors), config
        self.parent_config = parent_config
        self.auto_class = self.arch.auto_class
        self.method, self.seed = settings.method or "optimal", settings.seed
        self.grouping = settings.grouping or "contiguous"
        self.layouts = self.arch.layouts(config)
        self._before = before = arch.layouts(checkpoint.config)
        self._changed = [
            groups is not None and old.num_key_value_heads != new.num_key_value_heads
            for old, new in zip(before, self.layouts, strict=True)
        ]
        for layer, (old, new) in enumerate(zip(before, self.layouts, strict=True)):
            _check_reachable(old, new, layer)
        self.exact = all(
            new.num_key_value_heads >= old.num_key_value_heads
            for old, new in zip(before, self.layouts, strict=True)
        )
        self.calibrated = not self.exact and self.method in ("optimal", "aligned")
        self.fitted = not self.exact and self.method == "optimal"
        pools = self.method in POOLS and self.grouping == "contiguous"
        # Name of every key and value tensor that needs no other, and its layer.
        self._apart: dict[str, int] = {}
        if self.arch.fusion == "none" and not settings.measured and (pools or self.exact):
            self._apart = {
                name: i
                for i, new in enumerate(self._changed)
                if new
                for name in _keys_and_values(self.arch, config, i)
            }
        computed = self._apart.keys() or [name for layer in range(len(before)) for name in self.computed(layer)]
        self.outputs = grouped_outputs(checkpoint, self.arch, config, dtype=dtype, computed=computed)
        self._dtypes = {tensor.name: tensor.dtype for tensor in self.outputs}
        self.engines = [SAME_ARCHITECTURE]
        self.warnings: list[str] = []
        self.notes = list(self._notes(before)) if not self.exact else []

    def computed(self, layer: int) -> tuple[str, ...]:
        return self.arch.tensor_names(self.config, layer) if self._changed[layer] and not self._apart else ()

    def convert_layer(
        self, layer: int, weights: LayerWeights, record: LayerRecord | None
    ) -> tuple[LayerWeights, dict[str, Any]]:
        moments = {}
        if record is not None:
            inputs = weights.q.shape[2]
            known = {"moment": record.moment, "value_moment": record.value_moment}
            moments = {name: m[:inputs, :inputs] for name, m in known.items() if m is not None}
        merged, report = merge(
            weights,
            self.layouts[layer].num_key_value_heads,
            method=self.method,
            grouping=self.grouping,
            **moments,
            seed=self.seed + layer,
        )
        return merged, asdict(report)

    def tensors(self, layer: int, made: LayerWeights, record: LayerRecord | None) -> dict[str, Tensor]:
        tensors = self.arch.write_layer(self.config, layer, made, torch.float64)
        return {name: tensor.to(self._dtypes[name]) for name, tensor in tensors.items()}

    def module(self, layer: int, made: LayerWeights, device: torch.device, length: int) -> Refittable:
        model = empty_model(self.config, self.auto_class)
        prefix = f"{self.arch.layers[0].format(layer=layer)}.{self.arch.attention}."
        tensors = self.arch.write_layer(self.config, layer, made, torch.float32)
        # What no conversion touches, such as an output bias, is part of the function all the same.
        other = [n for n in self.source.tensors if n.startswith(prefix) and n not in tensors]
        load_into(model, {**{n: self.source.read(n) for n in other}, **tensors}, device)
        attention = model.get_submodule(f"{self.arch.module.format(layer=layer)}.{self.arch.attention}").to(device)
        free = {prefix + n: p for n, p in attention.named_parameters() if prefix + n in tensors}

        def export(record: LayerRecord) -> dict[str, Tensor]:
            return {name: p.detach().to("cpu", self._dtypes[name]) for name, p in free.items()}

        projection = attention.get_submodule(self.arch.projections["o"])
        return Refittable(attention, projection, list(free.values()), export)

    def carry(self, name: str, checkpoint: Checkpoint) -> Tensor:
        tensor = checkpoint.read(name)
        if name in self._apart:
            tensor = self._regroup(tensor, self._apart[name])
        return tensor.to(self._dtypes[name])

    def _regroup(self, tensor: Tensor, layer: int) -> Tensor:
        old, new = (layouts[layer].num_key_value_heads for layouts in (self._before, self.layouts))
        heads = tensor.unflatten(0, (old, -1))
        if new > old:
            return heads.repeat_interleave(new // old, 0).flatten(0, 1)
        return pool(heads, neighbours(old, old // new), self.method, self.seed + layer).flatten(0, 1)

    def _notes(self, before: list[AttentionLayout]) -> Iterator[str]:
        if self.arch.norms is not None and self.method in ("optimal", "aligned"):
            yield (
                f"{self.arch.model_type} normalises queries and keys: heads can be turned onto each other only by "
                "a sign per plane (a rotation where the norm's weights are equal), and not rescaled. Values keep "
                "their full freedom."
            )


def _keys_and_values(arch: Architecture, config: dict[str, Any], layer: int) -> list[str]:
    """The tensors of a layer with rows for each key-value head, in an architecture that does not fuse them."""
    parts = [arch.projections["k"], arch.projections["v"]]
    if arch.norms is not None and arch.norms.scope == "all":
        parts.append(arch.norms.k)
    prefix = f"{arch.layers[0].format(layer=layer)}.{arch.attention}."
    return [name for name in arch.tensor_names(config, layer) if name.removeprefix(prefix).split(".")[0] in parts]


def _check_reachable(old: AttentionLayout, new: AttentionLayout, layer: int) -> None:
    a, b = old.num_key_value_heads, new.num_key_value_heads
    if a % b and b % a:
        heads = old.num_attention_heads
        legal = [g for g in range(1, heads + 1) if heads % g == 0 and (a % g == 0 or g % a == 0)]
        raise HeadwiseError(
            f"Layer {layer} has {a} key-value heads, which cannot become {b}: heads are merged or repeated in "
            "equal groups.",
            f"Reachable: {', '.join(map(str, legal))}.",
        )
