"""Decide how the weights of an output are stored: plain, as block FP8, or as the source stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from headwise.compat import places_of
from headwise.convert.settings import ConvertSettings
from headwise.errors import SettingError
from headwise.io.quantized.forms import FORMS
from headwise.io.quantized.fp8 import BLOCK
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models.deepseek import KEPT_IN_FULL
from headwise.models.stock import empty_model

Encoded = tuple[list[OutputTensor], dict[str, Any], list[str]]


def encode_outputs(
    outputs: Sequence[OutputTensor],
    config: dict[str, Any],
    auto_class: str,
    checkpoint: Checkpoint,
    settings: ConvertSettings,
) -> Encoded:
    """Return the outputs with the way in which each is stored, the config that names it, and lines of the plan.

    Args:
        outputs: every tensor of the output.
        config: config.json of the output.
        auto_class: the transformers class that loads it.
        checkpoint: the source.
        settings: of the conversion.

    Raises:
        SettingError: `requantize` has nothing to quantise.
    """
    if settings.requantize is not None:
        return _to_fp8(outputs, config, auto_class, checkpoint)
    return _carried(outputs, config, checkpoint, settings)


def _carried(
    outputs: Sequence[OutputTensor], config: dict[str, Any], checkpoint: Checkpoint, settings: ConvertSettings
) -> Encoded:
    """Keep the source's quantised weights as they are, if none of them changes and their form is made for that."""
    quantized = checkpoint.quantized
    if quantized is None:
        return list(outputs), config, []
    copied = {tensor.name for tensor in outputs if tensor.source == tensor.name}
    kept = all(form.carried for form in FORMS[quantized.method]) and copied >= quantized.tensors.keys()
    if settings.dtype is not None or not kept:
        return list(outputs), config, ["The output is not quantised: config.json loses the quantization entry."]
    encoded = [_as_stored(t, checkpoint) if t.name in quantized.tensors else t for t in outputs]
    note = (
        f"The {len(quantized.tensors)} weights in {', '.join(quantized.kinds)} are carried over as they are "
        "stored; `dtype` bfloat16 writes them plain."
    )
    return encoded, {**config, "quantization_config": quantized.settings}, [note]


def _as_stored(tensor: OutputTensor, checkpoint: Checkpoint) -> OutputTensor:
    assert checkpoint.quantized is not None
    parts = checkpoint.quantized.tensors[tensor.name].parts.values()
    return replace(tensor, stored=tuple(OutputTensor(e.name, e.dtype, e.shape, e.name) for e in parts))


def _to_fp8(
    outputs: Sequence[OutputTensor], config: dict[str, Any], auto_class: str, checkpoint: Checkpoint
) -> Encoded:
    model = empty_model(config, auto_class)
    places = places_of(model, [tensor.name for tensor in outputs])
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    encoded: list[OutputTensor] = []
    kept: list[str] = []
    for tensor in outputs:
        module, leaf = tensor.name.rpartition(".")[::2]
        place = places[tensor.name] or ""
        owner = modules.get(place.rpartition(".")[0])
        matrix = leaf == "weight" and len(tensor.shape) == 2 and not isinstance(owner, nn.Embedding)
        linear = type(owner) is nn.Linear or ".experts." in place
        whole = matrix and not any(size % block for size, block in zip(tensor.shape, BLOCK, strict=True))
        if whole and linear and owner is not head and module.rpartition(".")[2] not in KEPT_IN_FULL:
            encoded.append(_in_blocks(tensor, checkpoint))
            continue
        encoded.append(tensor)
        if matrix:
            kept.append(module)
    count = sum(bool(tensor.stored) for tensor in encoded)
    if not count:
        raise SettingError(
            "requantize",
            f"`requantize` fp8 stores blocks of {BLOCK[0]} x {BLOCK[1]}, and no matrix of this output has whole "
            "blocks.",
            "Leave it out.",
        )
    entry = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": kept,
    }
    note = (
        f"{count} matrices are stored as FP8 in blocks of {BLOCK[0]} x {BLOCK[1]}, which rounds them; {len(kept)} "
        "stay in full (modules_to_not_convert)."
    )
    return encoded, {**config, "quantization_config": entry}, [note]


def _in_blocks(tensor: OutputTensor, checkpoint: Checkpoint) -> OutputTensor:
    """Return a matrix stored as block FP8: the source's own codes where they are such, and the matrix is a copy."""
    quantized = checkpoint.quantized
    if quantized is not None and tensor.source == tensor.name and tensor.name in quantized.tensors:
        parts = quantized.tensors[tensor.name].parts
        own = quantized.settings.get("weight_block_size", list(BLOCK))
        same = own == list(BLOCK) and parts["codes"].dtype == torch.float8_e4m3fn
        if quantized.method == "fp8" and same and parts["scale"].dtype == torch.float32:
            return _as_stored(tensor, checkpoint)
    rows, columns = (size // block for size, block in zip(tensor.shape, BLOCK, strict=True))
    # The codes are written last: a tensor whose name is in the journal is complete.
    return replace(
        tensor,
        stored=(
            OutputTensor(f"{tensor.name}_scale_inv", torch.float32, (rows, columns)),
            OutputTensor(tensor.name, torch.float8_e4m3fn, tensor.shape),
        ),
    )
