"""Forecast the memory of a conversion from shapes."""

from __future__ import annotations

import math
from typing import Any

import torch

from headwise.convert.calibration.attention_stats import NUM_ATTENTION_QUERIES
from headwise.convert.calibration.layer_stream import TOKENS_AT_ONCE
from headwise.convert.refit.output_projection import FOLDS
from headwise.convert.refit.regression import sequences_per_step
from headwise.convert.sparse.warm_up import indexer_bytes
from headwise.environment import available_memory
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models.protocol import AttentionModel

# A process that converts next to nothing: torch, the stock classes and a tokenizer (0.72 GB, the embedded model).
RESTING_BYTES = 690 << 20
# Copies of a text's logits beside the logits themselves: of a loss, and of a loss with its backward pass.
LOSS_COPIES, BACKWARD_COPIES = 1, 4
# Copies of the attention weights of one layer in a backward pass that computes them again.
WEIGHT_COPIES = 6
# Numbers that a backward pass keeps for a token and layer, in hidden states.
KEPT_STATES = 24


def require_free_memory(nbytes: int, device: torch.device) -> None:
    """Raise HeadwiseError unless a conversion whose peak is forecast as `nbytes` fits into the memory that is free.

    Nothing is checked on other devices than the CPU, or where the system does not report its free memory.

    Args:
        nbytes: the forecast peak.
        device: where layers are converted.

    Raises:
        HeadwiseError: the peak is larger than the free memory.
    """
    free = available_memory(device) if device.type == "cpu" else None
    # What an idle process holds is taken already.
    if free is not None and nbytes - RESTING_BYTES > free:
        raise HeadwiseError(
            f"The conversion needs {nbytes / 1e9:.2f} GB of memory at its peak, and {free / 1e9:.2f} GB are free.",
            "Read less text (`calibration_tokens`) or none (`calibrate` none), ask for a smaller `rank` of MLA, or "
            "merge with `method` mean, which needs the least.",
        )


def peak_memory(
    checkpoint: Checkpoint, arch: AttentionModel, target: Any, calibration: Any, device: torch.device
) -> int:
    """Return the bytes of memory at the peak, of the process and its device together.

    A conversion holds one layer's attention in float64 several times, or one tensor where heads are pooled or
    repeated tensor by tensor. Calibration adds the parent's layer in float32, the embedding table, the hidden
    states of all tokens (three times where the attention's inputs and outputs are kept) and the moments. On top
    comes the largest of the short-lived arrays: the widest intermediate of one batch, measured attention weights,
    the normal equations of the MLA search, one step of the regression. Reading a quantised tensor has intermediate
    results of its own.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        calibration: what is measured on the parent; None: nothing.
        device: where layers are converted.
    """
    stock = arch.stock_config(checkpoint.config)
    width = stock.hidden_size
    before = arch.layouts(checkpoint.config)
    computed = [i for i in range(len(target.layouts)) if target.converted_names(i)]
    if not computed:
        carried = (tensor.name for tensor in target.outputs if tensor.source is None)
        return (
            RESTING_BYTES
            + checkpoint.peak_bytes
            + 3 * max((checkpoint.tensors[name].nbytes for name in carried), default=0)
        )
    layouts = [target.layouts[i] for i in computed]
    attention = 8 * max(before[i].num_parameters(width) for i in computed)
    search = 0
    if any(layout.kv_lora_rank is not None for layout in layouts):
        # An MLA layer may be larger than its source layer, and both are in memory.
        attention += 8 * max(layout.num_parameters(width) for layout in layouts)
        if not target.exact:
            # Complex matrices of its features: terms of a sum, and a factorisation.
            search = int(
                4.5
                * 16
                * max(layout.num_attention_heads * layout.cache_elements_per_token**2 for layout in layouts)
            )
    total = RESTING_BYTES + checkpoint.peak_bytes + int(3.5 * attention)
    # Outside attention: a tensor in two copies, unless it is scaled chunk by chunk.
    names = {name for i in computed for name in target.converted_names(i)}
    names |= {tensor.name for tensor in target.outputs if tensor.name in target.scaled and not tensor.stored}
    rest = [each for each in target.outputs if each.source is None and each.name not in names]
    other = max((2 * each.nbytes + 10 * math.prod(each.shape[-2:]) for each in rest), default=0)
    if calibration is None or calibration.reuse is not None:
        return max(total + search + (2 * 8 * width * width if calibration else 0), RESTING_BYTES + other)
    depth = arch.layers[0].count(".") + 1
    sizes: dict[str, int] = {}
    for name, entry in checkpoint.tensors.items():
        key = ".".join(name.split(".")[:depth])
        sizes[key] = sizes.get(key, 0) + entry.nbytes
    # A tensor outside the layers is a group of its own; the largest of either kind is in memory at once.
    # Before a GPU the next layer is read ahead.
    layer = (4 if device.type == "cuda" else 3) * max(sizes.values())
    hidden = 4 * calibration.tokens * width * (3 if calibration.keeps_text else 1)
    moments = 6 * 8 * width * width
    length, heads = calibration.length, max(layout.num_attention_heads for layout in before)
    intermediate = 4 * 4 * TOKENS_AT_ONCE * getattr(stock, "intermediate_size", 4 * width)
    attention_stats = 0 if target.exact else 4 * heads * (4 * length**2 + NUM_ATTENTION_QUERIES * width)
    fit = max((indexer_bytes(layout, width, length) for layout in layouts if layout.indexer), default=0)
    if calibration.refits:
        # Solving for output matrices alone goes fold by fold, in batches of its own.
        sequences = calibration.sequences
        batch = min(max(1, TOKENS_AT_ONCE // length), -(-sequences // FOLDS))
        if calibration.steps:
            batch = min(sequences_per_step(device, length), sequences)
        scores = max(
            _scores_kept(layout, stock, batch, length, calibration.steps > 0, device) for layout in layouts
        )
        fit = max(fit, scores + (20 if calibration.steps else 8) * 4 * batch * length * width)
    # The last four are never in memory together.
    peak: int = total + layer + hidden + moments + max(search, intermediate, attention_stats, fit)
    return max(peak, RESTING_BYTES + other)


def _scores_kept(layout: Any, stock: Any, sequences: int, length: int, trained: bool, device: torch.device) -> int:
    """Return the bytes of attention weights.

    A fused kernel keeps none; it serves layers without a cap on scores. On a CPU, values are padded to its width;
    elsewhere it needs keys as wide as values.
    """
    fused = device.type == "cpu" or layout.head_dim == layout.v_head_dim
    if fused and not getattr(stock, "attn_logit_softcapping", None):
        return 0
    return int((3.5 if trained else 2.5) * 4 * sequences * layout.num_attention_heads * length**2)


def whole_model_memory(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    target: Any,
    *,
    loss_tokens: int = 0,
    damage_tokens: int = 0,
    loaded: bool = False,
    bytes_per_parameter: int = 4,
    fused: bool = True,
    streamed: bool = False,
) -> int:
    """Return the bytes at the peak of the stages that load a model whole, of the process and its device together.

    A model is loaded from its file, whose pages are in memory until all its weights have another precision. Then
    come the logits of one batch, or what a backward pass keeps. A GPU gets the tensors of a plain file one by one,
    and the system can drop their pages: measured on a model of 7B, the host holds 2.7 GB beside them.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        loss_tokens: of the batch on which a loss is measured; 0: neither that nor sampling.
        damage_tokens: of the sequence on which the damage of the layers is estimated; 0: it is not.
        loaded: whether the result is loaded whole to check it.
        bytes_per_parameter: of a model that is sampled from or measured.
        fused: whether attention computes its weights in parts; False: those of one layer are in memory at once.
        streamed: whether the models go to a GPU tensor by tensor.
    """
    stock = arch.stock_config(checkpoint.config)
    vocabulary = int(getattr(stock, "vocab_size", 0) or 0)
    ours, result = checkpoint.num_parameters, sum(math.prod(tensor.shape) for tensor in target.outputs)
    file = sum(tensor.nbytes for tensor in target.outputs)
    peak = 0
    if loss_tokens:
        logits = (1 + LOSS_COPIES) * 4 * loss_tokens * vocabulary
        sizes = ((ours, 0), (result, 0)) if streamed else ((ours, checkpoint.nbytes), (result, file))
        peak = max(bytes_per_parameter * count + max(pages, logits) for count, pages in sizes)
    if damage_tokens:
        kept = bytes_per_parameter * damage_tokens * KEPT_STATES * stock.hidden_size * len(target.layouts)
        if not fused:
            kept += WEIGHT_COPIES * 4 * max(each.num_attention_heads for each in target.layouts) * damage_tokens**2
        logits = (1 + BACKWARD_COPIES) * 4 * damage_tokens * vocabulary
        names = {name for layer in range(len(target.layouts)) for name in target.converted_names(layer)}
        attention = sum(
            tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in target.outputs if tensor.name in names
        )
        pages = 0 if streamed else checkpoint.nbytes
        peak = max(peak, bytes_per_parameter * ours + attention + max(pages, kept + logits))
    if loaded:
        peak = max(peak, 4 * result + file)
    return RESTING_BYTES + peak if peak else 0
