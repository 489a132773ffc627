"""The grouped target: the same architecture with another number of KV heads, or with none changed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headwise import registry
from headwise.convert.base import NONE_SCALED, Refittable
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.calibration.moments import measured_beside_text
from headwise.convert.gqa.grouping import contiguous_groups
from headwise.convert.gqa.merge import merge_heads
from headwise.convert.plan import grouped_outputs
from headwise.convert.settings import ConvertSettings
from headwise.errors import SettingError
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture, find_architecture
from headwise.models.layout import AttentionLayout, LayerWeights
from headwise.models.stock import empty_model, load_into


class GroupedTarget:
    """The same architecture with another number of KV heads.

    Repeating heads and pooling contiguous groups leave queries and outputs as they are. Unless the settings require
    measured layers, such keys and values are transformed one tensor at a time, and everything else is copied.

    Args:
        checkpoint: the source.
        arch: its row.
        config: the new config.json.
        parent_config: the source's config with the positions of `config`.
        settings: the method, the grouping and the seed.
        changed: the parts of the model that get another number of KV heads; none: no layer changes.
        dtype: of the output; None keeps each tensor's own.

    Raises:
        SettingError: the new number cannot be made from the heads of a layer, or the method is unknown.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        config: dict[str, Any],
        parent_config: dict[str, Any],
        settings: ConvertSettings,
        *,
        changed: Collection[str],
        dtype: torch.dtype | None = None,
    ) -> None:
        # A window may have changed the model type; the tensors are the same.
        self.source, self.arch, self.config = checkpoint, find_architecture(config, checkpoint.tensors), config
        self.parent_config = parent_config
        self.auto_class = self.arch.auto_class
        self.method, self.seed = registry.find_method("merge", settings.method or "optimal"), settings.seed
        self.grouping = settings.grouping or "contiguous"
        self.layouts = self.arch.layouts(config)
        self._before = arch.layouts(checkpoint.config)
        pairs = list(zip(self._before, self.layouts, strict=True))
        for layer, (old, new) in enumerate(pairs):
            _check_reachable(old, new, layer)
        self._changed = [
            old.part in changed and old.num_key_value_heads != new.num_key_value_heads for old, new in pairs
        ]
        self.exact = all(new.num_key_value_heads >= old.num_key_value_heads for old, new in pairs)
        measured = measured_beside_text(settings.images, settings.moments, checkpoint)
        runs = any(
            changed and (new.on_text or measured(layer))
            for layer, (changed, new) in enumerate(zip(self._changed, self.layouts, strict=True))
        )
        self.calibrated = not self.exact and runs and "moments" in self.method.needs
        self.fitted = not self.exact and runs and "text" in self.method.needs
        self._solved = self.fitted and settings.calibrate != "none"
        self.regresses_norms = False
        self.scaled = NONE_SCALED
        # The layer of every key and value tensor that is transformed without its layer's other tensors.
        self._tensorwise: dict[str, int] = {}
        pools = not self.method.needs and self.grouping == "contiguous"
        fused = any(self.arch.at(i)[0].fusion != "none" for i, changed in enumerate(self._changed) if changed)
        if not fused and not settings.measured and (pools or self.exact):
            self._tensorwise = {
                name: layer
                for layer, changed in enumerate(self._changed)
                if changed
                for name in _key_value_names(self.arch, config, layer)
            }
        self._computed = set(self._tensorwise) or {
            n for layer in range(len(pairs)) for n in self.converted_names(layer)
        }
        self.outputs = grouped_outputs(checkpoint, self.arch, config, dtype=dtype, computed=self._computed)
        self._dtypes = {tensor.name: tensor.dtype for tensor in self.outputs}
        self.warnings: list[str] = []
        self.notes: list[str] = []
        if settings.sliding_window:
            self._name_new_class()
        if self.calibrated and self.arch.norms is not None:
            self.notes.append(
                f"{self.arch.model_type} normalizes queries and keys: before they are merged, keys can be given a "
                "sign per plane (a rotation where the norm's weights are equal) and no scale. Values have no such "
                "limit."
                if not self.arch.query_gate
                else f"{self.arch.model_type} normalizes queries and keys, and a gate multiplies each element of a "
                "head's output: before they are merged, keys can be given a sign per plane and values a scale per "
                "element, and no more."
            )

    def _name_new_class(self) -> None:
        """Name a change of the class by a window."""
        before, after = (config["architectures"][0] for config in (self.source.config, self.config))
        if before != after:
            self.notes.append(f"The stock class becomes {after}, which has the window; it was {before}.")

    def explain(self, name: str) -> str:
        """See `Target`."""
        if name not in self._computed:
            return "another dtype"
        rows = self.arch.parts or (self.arch,)
        names = {f"{row.attention}.{module}": role for row in rows for role, module in row.projections.items()}
        part = next((role for end, role in names.items() if f".{end}." in name), None)
        if self.exact:
            return "heads repeated"
        if part in ("q", "o"):
            return "turned to its merged KV head" + "; solved on text" * (part == "o" and self._solved)
        return "heads merged"

    def converted_names(self, layer: int) -> tuple[str, ...]:
        """See `Target`."""
        return self.arch.tensor_names(self.config, layer) if self._changed[layer] and not self._tensorwise else ()

    def convert_layer(
        self, layer: int, weights: LayerWeights, record: LayerRecord | None
    ) -> tuple[LayerWeights, dict[str, Any]]:
        """See `Target`."""
        moments = {}
        if record is not None:
            inputs = weights.q.shape[2]
            states = weights.k.shape[2]
            measured = {
                "moment": (record.moment, inputs),
                "value_moment": (record.value_moment, states),
                "states_moment": (record.states_moment, states),
            }
            moments = {name: m[:width, :width] for name, (m, width) in measured.items() if m is not None}
        converted, report = merge_heads(
            weights,
            self.layouts[layer].num_key_value_heads,
            method=self.method.name,
            grouping=self.grouping,
            **moments,
            seed=self.seed + layer,
        )
        return converted, asdict(report)

    def export_layer(self, layer: int, converted: LayerWeights, record: LayerRecord | None) -> dict[str, Tensor]:
        """See `Target`."""
        tensors = self.arch.write_layer(self.config, layer, converted, torch.float64)
        return {name: tensor.to(self._dtypes[name]).cpu() for name, tensor in tensors.items()}

    def trainable_layer(self, layer: int, converted: LayerWeights, device: torch.device, length: int) -> Refittable:
        """See `Target`."""
        model = empty_model(self.config, self.auto_class)
        prefix = self.arch.prefix(layer)
        tensors = self.arch.write_layer(self.config, layer, converted, torch.float32)
        # Tensors that no conversion changes, such as an output bias, are part of the function all the same.
        other = [n for n in self.source.tensors if n.startswith(prefix) and n not in tensors]
        load_into(model, {**{n: self.source.read(n) for n in other}, **tensors}, device)
        attention = model.get_submodule(self.arch.attention_path(layer)).to(device)
        row, _ = self.arch.at(layer)
        free = {n: list(map(attention.get_parameter, row.stock_names(n.removeprefix(prefix)))) for n in tensors}

        def export(record: LayerRecord) -> dict[str, Tensor]:
            return {
                name: torch.cat([part.detach() for part in parts]).to(self._dtypes[name]).cpu()
                for name, parts in free.items()
            }

        projection = attention.get_submodule(row.output_projection)
        return Refittable(attention, projection, [part for parts in free.values() for part in parts], export)

    def transform_other(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """See `Target`."""
        tensor = checkpoint.read(name)
        if name in self._tensorwise:
            tensor = self._regroup(tensor, self._tensorwise[name])
        return tensor.to(self._dtypes[name])

    def _regroup(self, tensor: Tensor, layer: int) -> Tensor:
        """Repeat or pool the heads of one key or value tensor (rows of all heads, ...)."""
        old, new = (layouts[layer].num_key_value_heads for layouts in (self._before, self.layouts))
        heads = tensor.unflatten(0, (old, -1))
        if new > old:
            changed: Tensor = heads.repeat_interleave(new // old, 0)
        else:
            changed = self.method.load()(heads, contiguous_groups(old, old // new), self.seed + layer)
        return changed.flatten(0, 1)


def _check_reachable(old: AttentionLayout, new: AttentionLayout, layer: int) -> None:
    """Raise SettingError unless equal groups of the old heads, or equal numbers of replicas, make the new ones."""
    a, b = old.num_key_value_heads, new.num_key_value_heads
    if not old.can_become(b):
        possible = [groups for groups in range(1, old.num_attention_heads + 1) if old.can_become(groups)]
        raise SettingError(
            "groups",
            f"Layer {layer} has {a} key-value heads, which cannot become {b}: heads are merged or repeated in "
            "equal groups.",
            f"Give one of {', '.join(map(str, possible))}.",
        )


def _key_value_names(arch: Architecture, config: dict[str, Any], layer: int) -> list[str]:
    """Return the tensors of a layer with rows for each KV head, in an architecture that does not fuse them."""
    part, _ = arch.at(layer)
    modules = [part.projections["k"], part.projections["v"]]
    norms = part.qk_norm(config)
    if norms is not None and norms.scope == "all":
        modules.append(norms.k)
    prefix = arch.prefix(layer)
    return [n for n in arch.tensor_names(config, layer) if n.removeprefix(prefix).split(".")[0] in modules]
