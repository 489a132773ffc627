"""What a conversion makes: the new config, the tensors of the output, and how one layer becomes another.

`pipeline.py` carries out any `Target` in the same way: stream the parent if something must be measured, convert
layer by layer, copy the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headwise.convert.architecture import Architecture, find
from headwise.convert.calibration import LayerRecord
from headwise.convert.checkpoint import Checkpoint
from headwise.convert.heads import merge
from headwise.convert.layout import AttentionLayout, LayerWeights
from headwise.convert.plan import SAME_ARCHITECTURE, grouped_outputs
from headwise.convert.skeleton import empty_model, load_into
from headwise.convert.writer import OutputTensor
from headwise.errors import HeadwiseError


class Target(Protocol):
    """A decided conversion.

    Attributes:
        config, auto_class: the new config.json and the stock class that loads it.
        layouts: of every layer, afterwards.
        outputs: every tensor of the output.
        exact: the output computes the parent's function.
        calibrated: converting a layer makes use of measured moments.
        notes, warnings, engines: for the plan.
    """

    config: dict[str, Any]
    auto_class: str
    layouts: list[AttentionLayout]
    outputs: list[OutputTensor]
    exact: bool
    calibrated: bool
    notes: list[str]
    warnings: list[str]
    engines: list[str]

    def computed(self, layer: int) -> tuple[str, ...]:
        """Names of the output tensors that converting this layer gives; empty if it is only copied."""

    def convert_layer(
        self, layer: int, weights: LayerWeights, record: LayerRecord | None, dtype: torch.dtype | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One layer's output tensors and its report.

        Args:
            dtype: of the tensors; None: each as `outputs` says.
        """

    def module(self, layer: int, tensors: dict[str, Tensor], device: torch.device) -> Refittable:
        """The converted layer as a stock attention module in float32, to be refitted."""

    def carry(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """An output tensor outside the converted attention that is not a plain copy."""


@dataclass(frozen=True)
class Refittable:
    """A stock attention module, the parameters a refit may change, and the way back to output tensors."""

    attention: nn.Module
    parameters: dict[str, nn.Parameter]

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by the names of the output tensors they belong to."""
        return {name: p.detach().cpu() for name, p in self.parameters.items()}


class GroupedTarget:
    """The same architecture with another number of key-value heads (or none changed: `groups` is None)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        config: dict[str, Any],
        *,
        groups: int | None,
        method: str = "optimal",
        grouping: str = "optimal",
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        # A window may have turned the model into another type of the same tensors.
        self.source, self.arch, self.config = checkpoint, find(config, checkpoint.tensors), config
        self.auto_class = self.arch.auto_class
        self.method, self.grouping, self.seed = method, grouping, seed
        self.layouts = self.arch.layouts(config)
        before = arch.layouts(checkpoint.config)
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
        self.calibrated = not self.exact and method in ("optimal", "aligned")
        computed = [name for layer in range(len(before)) for name in self.computed(layer)]
        self.outputs = grouped_outputs(checkpoint, self.arch, config, dtype=dtype, computed=computed)
        self._dtypes = {tensor.name: tensor.dtype for tensor in self.outputs}
        self.engines = [SAME_ARCHITECTURE]
        self.warnings: list[str] = []
        self.notes = list(self._notes(before)) if not self.exact else []

    def computed(self, layer: int) -> tuple[str, ...]:
        return self.arch.tensor_names(self.config, layer) if self._changed[layer] else ()

    def convert_layer(
        self, layer: int, weights: LayerWeights, record: LayerRecord | None, dtype: torch.dtype | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        moments = {}
        if record is not None:
            inputs = weights.q.shape[2]
            moments = {name: moment[:inputs, :inputs] for name, moment in record.moments().items()}
            weights = weights.to_device(record.moment.device)
        merged, report = merge(
            weights,
            self.layouts[layer].num_key_value_heads,
            method=self.method,
            grouping=self.grouping,
            **moments,
            seed=self.seed + layer,
        )
        tensors = self.arch.write_layer(self.config, layer, merged.to_device("cpu"), dtype or torch.float64)
        if dtype is None:
            tensors = {name: tensor.to(self._dtypes[name]) for name, tensor in tensors.items()}
        return tensors, asdict(report)

    def module(self, layer: int, tensors: dict[str, Tensor], device: torch.device) -> Refittable:
        model = empty_model(self.config, self.auto_class)
        load_into(model, {name: tensor.clone() for name, tensor in tensors.items()}, device)
        path = f"{self.arch.module.format(layer=layer)}.{self.arch.attention}"
        attention = model.get_submodule(path)
        prefix = f"{self.arch.layers[0].format(layer=layer)}.{self.arch.attention}."
        other = {n: p for n, p in attention.named_parameters() if prefix + n not in tensors}
        # What no conversion touches, such as an output bias, is part of the function all the same.
        load_into(model, {prefix + n: self.source.read(prefix + n) for n in other}, device)
        parameters = {prefix + n: p for n, p in attention.named_parameters() if prefix + n in tensors}
        return Refittable(attention.to(device), parameters)

    def carry(self, name: str, checkpoint: Checkpoint) -> Tensor:
        return checkpoint.read(name).to(self._dtypes[name])

    def _notes(self, before: list[AttentionLayout]) -> Iterator[str]:
        if self.arch.norms is not None and self.method in ("optimal", "aligned"):
            yield (
                f"{self.arch.model_type} normalises queries and keys: heads can be turned onto each other only by "
                "a sign per plane (a rotation where the norm's weights are equal), and not rescaled. Values keep "
                "their full freedom."
            )


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
