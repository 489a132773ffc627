"""What a conversion makes: the new config, the tensors of the output, and how one layer becomes another.

`pipeline.py` carries out any `Target` in the same way: stream the parent if something must be measured, convert
layer by layer, copy the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.refit.regression import LEARNING_RATE
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models.layout import AttentionLayout, LayerWeights


class Target(Protocol):
    """A decided conversion.

    Attributes:
        config, auto_class: the new config.json and the stock class that loads it.
        parent_config: the source's config with the positions that `config` has, the function to come close to.
        layouts: of every layer, afterwards.
        outputs: every tensor of the output.
        exact: the output computes the parent's function.
        calibrated: converting a layer makes use of measured moments.
        fitted: the output matrices of a converted layer are solved for on the calibration text.
        notes, warnings, engines: for the plan.
    """

    config: dict[str, Any]
    parent_config: dict[str, Any]
    auto_class: str
    layouts: list[AttentionLayout]
    outputs: list[OutputTensor]
    exact: bool
    calibrated: bool
    fitted: bool
    notes: list[str]
    warnings: list[str]
    engines: list[str]

    def computed(self, layer: int) -> tuple[str, ...]:
        """Names of the output tensors that converting this layer gives; empty if it is only copied."""

    def convert_layer(
        self, layer: int, weights: LayerWeights, record: LayerRecord | None
    ) -> tuple[Any, dict[str, Any]]:
        """One converted layer, in the target's own float64 form, and its report.

        `weights` are where `record` is; so is the result.
        """

    def tensors(self, layer: int, made: Any, record: LayerRecord | None) -> dict[str, Tensor]:
        """The output tensors of a converted layer, rounded once to what `outputs` says."""

    def module(self, layer: int, made: Any, device: torch.device, length: int) -> Refittable:
        """A converted layer as a float32 module for sequences of `length`, to be refitted."""

    def carry(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """An output tensor outside the converted attention that is not a plain copy."""


@dataclass(frozen=True)
class Refittable:
    """An attention module that can be trained, and the way back.

    `projection` is its last step, from heads to output. `export` gives the output tensors of what the module has
    become. `arguments` is what the module is called with besides its input, where that differs from what the
    parent's is called with. `learning_rate` is the peak of the refit, relative to each weight's size.
    """

    attention: nn.Module
    projection: nn.Module
    parameters: list[nn.Parameter]
    export: Callable[[LayerRecord], dict[str, Tensor]]
    arguments: dict[str, Any] | None = None
    learning_rate: float = LEARNING_RATE
