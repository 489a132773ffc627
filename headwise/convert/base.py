"""The protocol of a conversion target: the new config, the output tensors, and how one layer is converted.

`pipeline.py` carries out any `Target` in the same way: measure the parent if the method needs it, convert layer by
layer, copy the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models.layout import AttentionLayout
from headwise.models.mla_source import ScaledCopy

# Of a target that scales no tensor. Other processes get it pickled, which a mapping proxy cannot be.
NONE_SCALED: Mapping[str, ScaledCopy] = {}


class Target(Protocol):
    """A decided conversion.

    Attributes:
        config: the new config.json.
        auto_class: the name of the transformers auto class that loads the output.
        parent_config: the source's config with the positions of `config`: the function to approximate.
        layouts: of every layer of the output.
        outputs: every tensor of the output.
        exact: whether the output computes the parent's function.
        calibrated: whether converting a layer makes use of measured moments.
        fitted: whether the output matrices of a converted layer are solved for on the calibration text.
        regresses_norms: whether converting a layer needs the moments of its normed queries and keys.
        scaled: the output tensors outside the converted attention that are a factor times a source tensor, by name.
        notes: lines of the plan about the decisions.
        warnings: lines of the plan that the user must not miss.
    """

    config: dict[str, Any]
    parent_config: dict[str, Any]
    auto_class: str
    layouts: list[AttentionLayout]
    outputs: list[OutputTensor]
    exact: bool
    calibrated: bool
    fitted: bool
    regresses_norms: bool
    scaled: Mapping[str, ScaledCopy]
    notes: list[str]
    warnings: list[str]

    def explain(self, name: str) -> str:
        """Return why an output tensor is not a copy of the source's, in a few words.

        Args:
            name: of the output tensor, or of a source tensor that has no place in the output.
        """

    def converted_names(self, layer: int) -> tuple[str, ...]:
        """Return the names of a layer's converted output tensors; none if the layer is only copied.

        Args:
            layer: its index.
        """

    def convert_layer(self, layer: int, weights: Any, record: LayerRecord | None) -> tuple[Any, dict[str, Any]]:
        """Convert one layer.

        Args:
            layer: its index.
            weights: of the source (`AttentionModel.read_layer`), on the device of `record`.
            record: what was measured on the layer; None if nothing was.

        Returns:
            The converted layer in the target's own float64 form, on the same device, and its report.
        """

    def export_layer(self, layer: int, converted: Any, record: LayerRecord | None) -> dict[str, Tensor]:
        """Return the output tensors of a converted layer, rounded once to the dtypes of `outputs`.

        Args:
            layer: its index.
            converted: the first result of `convert_layer`.
            record: what was measured on the layer; None if nothing was.
        """

    def trainable_layer(self, layer: int, converted: Any, device: torch.device, length: int) -> Refittable:
        """Return a converted layer as a float32 module.

        Args:
            layer: its index.
            converted: the first result of `convert_layer`.
            device: of the module.
            length: tokens in the sequences that it is called with.
        """

    def transform_other(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """Return an output tensor outside the converted attention that is neither copied nor scaled.

        Args:
            name: of the output tensor.
            checkpoint: the source.
        """


@dataclass(frozen=True)
class Refittable:
    """An attention module that can be trained, and the way back to output tensors.

    Attributes:
        attention: the module.
        projection: its last step, from the concatenated heads to the output.
        parameters: those of its parameters that may change.
        export: returns the output tensors of the module in its present state.
        arguments: the arguments of the module besides its input, where they differ from those of the parent's
            module.
    """

    attention: nn.Module
    projection: nn.Module
    parameters: list[nn.Parameter]
    export: Callable[[LayerRecord], dict[str, Tensor]]
    arguments: dict[str, Any] | None = None
