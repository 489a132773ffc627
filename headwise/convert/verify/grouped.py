"""Check a folder of the parent's own class: its grouped attention, and what it shares with the parent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.convert.gqa.merge import merge_heads
from headwise.convert.verify.layer_inputs import StockAttention, attention_inputs, relative_error, tokens_of_text
from headwise.convert.verify.rounded import is_stored, rounds_weights
from headwise.convert.verify.whole_model import compare_logits
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture, find_architecture
from headwise.models.stock import empty_model, load_into

# Float64 evaluations of the same weights differ by rounding; some stock classes round to float32 inside.
TOLERANCE = 1e-5


class RepeatedAttention:
    """Evaluate the attention of single layers with its keys and values repeated for every query head, in float64.

    Args:
        checkpoint: the folder.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._arch = arch = find_architecture(checkpoint.config, checkpoint.tensors)
        self._layouts = arch.layouts(checkpoint.config)
        self._config = arch.with_groups(
            checkpoint.config, {layout.part: layout.num_attention_heads for layout in self._layouts}
        )
        self._stock = StockAttention(self._config, arch)

    def __call__(
        self,
        layer: int,
        inputs: Tensor,
        arguments: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the outputs of one layer, (sequences, tokens, D) float64.

        Args:
            layer: its index.
            inputs: (sequences, tokens, D) float64.
            arguments: further arguments of the module; None: those of the model's own forward.
            tensors: of the layer's attention as the folder has them; None: they are read.
        """
        if tensors is None:
            tensors = self._arch.tensors(self._checkpoint, layer, inputs.device)
        return self._stock(layer, self.repeated(layer, tensors), inputs, arguments)

    def repeated(self, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a layer's attention with repeated keys and values.

        Args:
            layer: its index.
            tensors: as the folder has them.
        """
        arch, config = self._arch, self._checkpoint.config
        names = arch.tensor_names(config, layer)
        heads = self._layouts[layer].num_attention_heads
        weights, _ = merge_heads(arch.read_layer(config, layer, {n: tensors[n] for n in names}), heads)
        return {**tensors, **arch.write_layer(self._config, layer, weights, torch.float64)}

    def whole_model(self) -> Any:
        """Return the stock model in float64, on the CPU, with repeated keys and values."""
        model = empty_model(self._config, self._arch.auto_class, torch.float64)
        tensors = {name: self._checkpoint.read(name) for name in self._checkpoint.tensors}
        for layer in range(len(self._layouts)):
            if self._layouts[layer].attends:
                tensors |= self.repeated(layer, self._arch.tensors(self._checkpoint, layer))
        load_into(model, tensors)
        model.tie_weights()
        return model


def shares_heads(checkpoint: Checkpoint) -> bool:
    """Return whether query heads of a folder share keys and values.

    Args:
        checkpoint: the folder.
    """
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    return any(layout.queries_per_group > 1 for layout in arch.layouts(checkpoint.config))


def check_groups(
    checkpoint: Checkpoint, arch: Architecture, device: torch.device | str = "cpu"
) -> tuple[bool, str]:
    """Compare the stock grouped attention with the same heads repeated for every query head, in every layer.

    Args:
        checkpoint: the folder.
        arch: its stock class.
        device: where the layers run that compute the inputs.

    Returns:
        Whether they agree, and the measured errors in words.
    """
    if not shares_heads(checkpoint):
        return True, "every query head has its own keys and values"
    grouped, repeated = StockAttention(checkpoint.config, arch), RepeatedAttention(checkpoint)
    tokens = tokens_of_text(checkpoint, arch)
    worst, worst_layer = 0.0, 0
    for layer, x, more, tensors in attention_inputs(checkpoint, arch, tokens, device):
        error = relative_error(grouped(layer, tensors, x, more), repeated(layer, x, more, tensors))
        if not error <= worst:
            worst, worst_layer = error, layer
    count = sum(layout.attends for layout in arch.layouts(checkpoint.config))
    detail = (
        f"attention of all {count} layers within {worst:.1e} of its heads repeated "
        f"(layer {worst_layer}), limit {TOLERANCE:.0e}, in float64"
    )
    return worst < TOLERANCE, detail


def compare_grouped(
    checkpoint: Checkpoint,
    parent: Checkpoint,
    arch: Architecture,
    *,
    compare: bool,
    trained: bool,
    device: torch.device | str = "cpu",
) -> tuple[bool, str]:
    """Compare what is not attention with the parent's tensors, and an exact conversion with the parent's attention.

    Args:
        checkpoint: the folder.
        parent: the model that it was converted from, with the folder's context and window.
        arch: the folder's stock class.
        compare: compare the tensors outside the converted attention too.
        trained: whether the folder was trained since; only its shape is then the parent's.
        device: where models and their layers run.
    """
    old = find_architecture(parent.config, parent.tensors)
    before, after = old.layouts(parent.config), arch.layouts(checkpoint.config)
    if len(before) != len(after):
        return False, f"the parent has {len(before)} layers, and the folder {len(after)}"
    fields = _changed_fields(old, parent.config, arch, checkpoint.config)
    if fields:
        return False, f"config.json differs from the parent's in {', '.join(fields)}"
    converted = {
        name
        for layer, (a, b) in enumerate(zip(before, after, strict=True))
        if a.num_key_value_heads != b.num_key_value_heads
        for name in arch.tensor_names(checkpoint.config, layer)
    }
    rest = [n for n in checkpoint.tensors if n not in converted]
    lost = [n for n in rest if n not in parent.tensors]
    changed = [
        n
        for n in rest
        if compare
        and not trained
        and n in parent.tensors
        and not is_stored(checkpoint, n, parent.read(n).to(checkpoint.tensors[n].dtype))
    ]
    if lost or changed:
        return False, f"outside the converted attention {', '.join([*lost, *changed][:3])} differ from the parent's"
    if trained:
        return True, "the parent's names and configuration; its weights were trained since"
    if rounds_weights(checkpoint):
        return True, f"{len(rest)} tensors outside the converted attention are the parent's, some rounded to FP8"
    if any(b.num_key_value_heads < a.num_key_value_heads for a, b in zip(before, after, strict=True)):
        return True, f"{len(rest)} tensors outside the converted attention are the parent's"
    attention, reference = StockAttention(checkpoint.config, arch), StockAttention(parent.config, old)
    tokens = tokens_of_text(parent, old)
    worst, worst_layer = 0.0, 0
    for layer, x, more, tensors in attention_inputs(parent, old, tokens, device):
        rounded = {name: tensor.to(checkpoint.tensors[name].dtype) for name, tensor in tensors.items()}
        actual = attention(layer, arch.tensors(checkpoint, layer, x.device), x, more)
        error = relative_error(actual, reference(layer, rounded, x, more))
        if not error <= worst:
            worst, worst_layer = error, layer
    agree, logits = compare_logits(checkpoint, parent, arch, old, recomputed=False, device=device)
    detail = (
        f"attention of all layers within {worst:.1e} of the parent's (layer {worst_layer}), limit {TOLERANCE:.0e}"
    )
    return worst < TOLERANCE and agree, f"exact: {detail}{logits}"


def _changed_fields(
    old: Architecture, before: dict[str, Any], arch: Architecture, after: dict[str, Any]
) -> list[str]:
    """Return the fields that both stock configs of the language model have and that differ."""
    if arch.parts:
        pairs = zip(old.parts, arch.parts, strict=True)
        counts = {part.num_key_value_heads for part in arch.parts}
        return sorted({name for a, b in pairs for name in _changed_fields(a, before, b, after)} - counts)
    a, b = old.stock_config(before).to_dict(), arch.stock_config(after).to_dict()
    free = {arch.num_key_value_heads, "dtype", "torch_dtype", "transformers_version", "architectures"}
    if "rope_parameters" in a.keys() & b.keys():
        free.add(
            "partial_rotary_factor"
        )  # it is in rope_parameters; some classes also keep an unused default of it
    return sorted(name for name in a.keys() & b.keys() - free if a[name] != b[name])
