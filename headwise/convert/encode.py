"""Decide how the weights of an output are stored: plain, as block FP8, or as the source stores them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compat import places_of
from headwise.convert.settings import ConvertSettings
from headwise.errors import SettingError
from headwise.format import size
from headwise.io.quantized.forms import FORMS
from headwise.io.quantized.fp8 import BLOCK
from headwise.io.quantized.powers import MAX_EXPONENT, POWERS, exponent_of
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models.deepseek import INPUT_NORM, INPUT_READERS, KEPT_IN_FULL, NORM_TOLERANCE, norm_scales
from headwise.models.stock import empty_model
from headwise.serving.engines import stores_powers

# In the name of a tensor of an expert.
EXPERTS = ".experts."
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
    return _with_powers(*_carried(outputs, config, checkpoint, settings), checkpoint, settings)


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


def _with_powers(
    outputs: list[OutputTensor],
    config: dict[str, Any],
    notes: list[str],
    checkpoint: Checkpoint,
    settings: ConvertSettings,
) -> Encoded:
    """Store the norm before MLA with a smaller power of two, and all its readers with that much larger ones."""
    if not stores_powers(config, settings.engines):
        return outputs, config, notes
    norms = [t for t in outputs if t.name.endswith(f".{INPUT_NORM}.weight")]
    exponent = _choose_exponent([checkpoint.read(t.name).to(t.dtype) for t in norms])
    if exponent < 1:
        return outputs, config, notes
    powers = {INPUT_NORM: -exponent} | {
        name: exponent for name in INPUT_READERS if any(f".{name}.weight" in t.name for t in outputs)
    }
    encoded = [replace(t, exponent=exponent_of(t.name, powers)) for t in outputs]
    readers = ", ".join(name for name in powers if name != INPUT_NORM)
    note = (
        f"{INPUT_NORM} is stored times 2^-{exponent}, and {readers} times 2^{exponent}: the same function, and "
        "quantizers without options keep it. No weight is rounded by that."
    )
    return encoded, {**config, POWERS: powers}, [*notes, note]


def _choose_exponent(norms: Sequence[Tensor]) -> int:
    """Choose the power of two by which the inputs of attention shrink and the rows before the latent norm grow.

    Quantized types have float16 scales, for weights and for the inputs of products. Inputs of size x and rows of
    size r / (x sqrt(n)), of n columns and a latent of size r, become about equally large (mathematics, section 4a).
    No norm becomes subnormal.

    Args:
        norms: (n,) the weight of every norm before attention, in the dtype of the output.
    """
    sizes = [float(norm.double().square().mean().sqrt()) for norm in norms]
    smallest = min((float(norm[norm != 0].abs().min()) for norm in norms if bool(norm.any())), default=0.0)
    size = statistics.median(sizes) if sizes else 0.0
    if not (size > 0 and smallest > 0 and math.isfinite(size)):
        return 0
    latent = norm_scales(NORM_TOLERANCE)[0]
    balanced = math.ceil(math.log2(size) + math.log2(len(norms[0])) / 4 - latent / 2)
    return min(
        balanced, math.floor(math.log2(smallest / torch.finfo(norms[0].dtype).smallest_normal)), MAX_EXPONENT
    )


def _as_stored(tensor: OutputTensor, checkpoint: Checkpoint) -> OutputTensor:
    assert checkpoint.quantized is not None
    parts = checkpoint.quantized.tensors[tensor.name].parts.values()
    return replace(tensor, stored=tuple(OutputTensor(e.name, e.dtype, e.shape, e.name) for e in parts))


def _to_fp8(
    outputs: Sequence[OutputTensor], config: dict[str, Any], auto_class: str, checkpoint: Checkpoint
) -> Encoded:
    _refuse_carried(checkpoint)
    model = empty_model(config, auto_class)
    places = places_of(model, [tensor.name for tensor in outputs])
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    encoded: list[OutputTensor] = []
    kept: dict[str, None] = {}  # names of modules, in the order of the output
    fused = 0
    for tensor in outputs:
        module, leaf = tensor.name.rpartition(".")[::2]
        place = places[tensor.name] or ""
        owner = modules.get(place.rpartition(".")[0])
        of_expert = EXPERTS in place
        linear = (type(owner) is nn.Linear and owner is not head) or of_expert
        full = module.rpartition(".")[2] in KEPT_IN_FULL
        if leaf == "weight" and linear and not full and _has_whole_blocks(tensor.shape):
            encoded.append(_in_blocks(tensor, checkpoint))
            continue
        encoded.append(tensor)
        if of_expert:  # the stock class has one module for all experts of a layer
            kept[tensor.name.partition(EXPERTS)[0] + EXPERTS.rstrip(".")] = None
            fused += tensor.nbytes if len(tensor.shape) > 2 else 0
        elif leaf == "weight" and len(tensor.shape) > 1 and not isinstance(owner, nn.Embedding):
            kept[module] = None
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
        "modules_to_not_convert": list(kept),
    }
    notes = [
        f"{count} matrices are stored as FP8 in blocks of {BLOCK[0]} x {BLOCK[1]}, which rounds them; {len(kept)} "
        "modules stay in full (modules_to_not_convert)."
    ]
    if fused:
        # Its loader knows the scales of matrices only: it reads the codes of fused experts as their weights.
        notes.append(
            f"The experts stay in bfloat16, {size(fused)} of {size(sum(t.nbytes for t in encoded))}: "
            "the class stores those of a layer in one tensor, which stock transformers does not read from FP8."
        )
    return encoded, {**config, "quantization_config": entry}, notes


def _has_whole_blocks(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and all(
        extent and extent % block == 0 for extent, block in zip(shape, BLOCK, strict=True)
    )


def _refuse_carried(checkpoint: Checkpoint) -> None:
    """Refuse a source whose weights are carried over as they are: config.json has room for one quantisation."""
    quantized = checkpoint.quantized
    if quantized is not None and all(form.carried for form in FORMS[quantized.method]):
        kinds = ", ".join(quantized.kinds)
        raise SettingError(
            "requantize",
            f"The experts of {checkpoint.source} are stored in {kinds}, which cannot stand beside FP8: config.json "
            "names one quantisation. With `requantize` fp8 they would become bfloat16, almost four times as large.",
            f"Leave it out: the experts then keep their {kinds}.",
        )


def _in_blocks(tensor: OutputTensor, checkpoint: Checkpoint) -> OutputTensor:
    """Return a matrix stored as block FP8: the source's own codes where they are such, and the matrix is a copy."""
    quantized = checkpoint.quantized
    if quantized is not None and tensor.source == tensor.name and tensor.name in quantized.tensors:
        parts = quantized.tensors[tensor.name].parts
        own = quantized.settings.get("weight_block_size", list(BLOCK))
        same = own == list(BLOCK) and parts["codes"].dtype == torch.float8_e4m3fn
        if quantized.method == "fp8" and same and parts["scale"].dtype == torch.float32:
            return _as_stored(tensor, checkpoint)
    rows, columns = (extent // block for extent, block in zip(tensor.shape, BLOCK, strict=True))
    # The codes are written last: a tensor whose name is in the journal is complete.
    return replace(
        tensor,
        stored=(
            OutputTensor(f"{tensor.name}_scale_inv", torch.float32, (rows, columns)),
            OutputTensor(tensor.name, torch.float8_e4m3fn, tensor.shape),
        ),
    )
