"""Forecast the time and memory of a conversion from shapes, and choose the defaults that depend on them.

The same command on the same kind of machine makes the same choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from headwise.convert.calibration.attention_stats import NUM_ATTENTION_QUERIES
from headwise.convert.calibration.layer_stream import TOKENS_AT_ONCE
from headwise.convert.refit.output_projection import FOLDS
from headwise.convert.refit.regression import DEFAULT_STEPS, SEQUENCES_PER_STEP, forecast_flops
from headwise.convert.sparse.warm_up import INDEX_STEPS, indexer_bytes, indexer_flops
from headwise.environment import available_memory
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture

# Longest calibration sequence: how far attention looks is measured on it.
CALIBRATION_LENGTH = 1024
# Tokens for the closed forms, for a refit of each layer, which learns from every one of them, and for closed forms
# before a joint refit, which samples far more text anyway.
TOKENS, TOKENS_FOR_REFIT, TOKENS_BEFORE_JOINT = 32_768, 196_608, 98_304
# Numbers of hidden states kept in memory for calibration at most: 512 MiB in float32.
HIDDEN_NUMBERS = 1 << 27
# Refit by itself only if this is not exceeded.
REFIT_SECONDS = 600.0
# Sustained float32 rates on small layers, on the low side of what was measured.
CUDA_FLOPS = 5e12
CPU_FLOPS_PER_THREAD = 2e10
# Work of the MLA search in units of heads x cache row x width^2, measured on SmolLM2-135M.
MLA_SEARCH = 110.0
# Bytes of weights read and written in a second, measured on two cores.
FILE_RATE = 2.5e8
# An idle process that has imported torch and transformers.
RESTING_BYTES = 450 << 20


def trained_length(arch: Architecture, config: dict[str, Any]) -> int:
    """Return the context of a config in tokens; 2048 where the config class has none.

    Args:
        arch: the architecture of the source.
        config: its config.json, or one with other positions.
    """
    length = getattr(arch.stock_config(config), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else 2048


def calibration_length(indexers: bool, *, exact: bool) -> int:
    """Return the longest calibration sequence.

    Args:
        indexers: whether indexers are trained, which need distant keys.
        exact: whether the layers are converted without moments of attention, which take memory of length squared.
    """
    return (4 if exact else 2) * CALIBRATION_LENGTH if indexers else CALIBRATION_LENGTH


def calibration_tokens(
    checkpoint: Checkpoint, arch: Architecture, steps: int, *, joint: bool = False, index_steps: int = 0
) -> int:
    """Return the number of calibration tokens where the settings name none.

    Args:
        checkpoint: the source.
        arch: its architecture.
        steps: of regression for every layer; 0: none.
        joint: whether a joint refit follows.
        index_steps: of training for every indexer; 0: none.
    """
    width = arch.stock_config(checkpoint.config).hidden_size
    most = TOKENS_FOR_REFIT if steps else TOKENS_BEFORE_JOINT if joint or index_steps else TOKENS
    tokens: int = max(4 * CALIBRATION_LENGTH, min(most, HIDDEN_NUMBERS // width))
    return tokens


def refit_steps(
    checkpoint: Checkpoint, arch: Architecture, target: Any, refit: str | int, length: int, device: torch.device
) -> int:
    """Return the steps of regression per layer: the given number, or for "auto" the default if it is short enough.

    Published baselines are compared as published, so "auto" trains only after calibrated methods.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        refit: the value of the setting `refit`.
        length: tokens in a calibration sequence.
        device: where the layers are trained.
    """
    if isinstance(refit, int):
        return refit
    if refit == "layers":
        return DEFAULT_STEPS
    if refit in ("off", "joint") or not target.calibrated:
        return 0
    return DEFAULT_STEPS if refit_seconds(checkpoint, arch, target, length, device) <= REFIT_SECONDS else 0


def refit_seconds(
    checkpoint: Checkpoint, arch: Architecture, target: Any, length: int, device: torch.device
) -> float:
    """Return the forecast seconds of the regression of every converted layer with the default steps.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        length: tokens in a calibration sequence.
        device: where the layers are trained.
    """
    width = arch.stock_config(checkpoint.config).hidden_size
    flops = 0.0
    for i, layout in enumerate(target.layouts):
        if target.converted_names(i):
            flops += forecast_flops(
                layout.num_parameters(width),
                layout.num_attention_heads,
                layout.head_dim,
                length,
                DEFAULT_STEPS,
            )
    return flops / _sustained_flops(device)


def index_steps(arch: Architecture, target: Any, steps: int | None, length: int, device: torch.device) -> int:
    """Return the steps of training for every indexer: the given number, or the default if it is short enough.

    Args:
        arch: the architecture of the source.
        target: the decided conversion.
        steps: the value of the setting `index_steps`.
        length: tokens in a calibration sequence.
        device: where the indexers are trained.
    """
    if steps is not None:
        return steps
    return INDEX_STEPS if indexer_seconds(arch, target, INDEX_STEPS, length, device) <= REFIT_SECONDS else 0


def indexer_seconds(arch: Architecture, target: Any, steps: int, length: int, device: torch.device) -> float:
    """Return the forecast seconds of making the indexers of all layers.

    Args:
        arch: the architecture of the source.
        target: the decided conversion.
        steps: of training.
        length: tokens in a calibration sequence.
        device: where the indexers are trained.
    """
    width = arch.stock_config(target.parent_config).hidden_size
    layouts = [layout for layout in target.layouts if layout.indexer]
    flops = sum(indexer_flops(layout, width, length, steps) for layout in layouts)
    return flops / _sustained_flops(device)


def _sustained_flops(device: torch.device) -> float:
    """Return the operations in a second on small layers."""
    return CUDA_FLOPS if device.type == "cuda" else CPU_FLOPS_PER_THREAD * torch.get_num_threads()


def layer_seconds(checkpoint: Checkpoint, arch: Architecture, target: Any, device: torch.device) -> float:
    """Return the forecast seconds of the closed forms of every converted layer.

    Merging heads is the work of a few products of the attention's matrices. The search of MLA solves the normal
    equations of every head again and again.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        device: where the layers are converted.
    """
    width = arch.stock_config(checkpoint.config).hidden_size
    flops = 0.0
    for i, layout in enumerate(target.layouts):
        if not target.converted_names(i):
            continue
        if layout.kv_lora_rank is None or target.exact:
            flops += layout.num_attention_heads * layout.head_dim * width**2
        else:
            flops += MLA_SEARCH * layout.num_attention_heads * layout.cache_elements_per_token * width**2
    return flops / _sustained_flops(device)


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


def peak_memory(checkpoint: Checkpoint, arch: Architecture, target: Any, calibration: Any) -> int:
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
    # Outside attention: a tensor in two copies, and its values in float64 while they are scaled. A stack of experts
    # is made one by one.
    names = {name for i in computed for name in target.converted_names(i)}
    other = 0
    for tensor in target.outputs:
        if tensor.source is None and tensor.name not in names:
            other = max(other, 2 * tensor.nbytes + 10 * math.prod(tensor.shape[-2:]))
    if calibration is None or calibration.reuse is not None:
        return max(total + search + (2 * 8 * width * width if calibration else 0), RESTING_BYTES + other)
    depth = arch.layers[0].count(".") + 1
    sizes: dict[str, int] = {}
    for name, entry in checkpoint.tensors.items():
        key = ".".join(name.split(".")[:depth])
        sizes[key] = sizes.get(key, 0) + entry.nbytes
    # A tensor outside the layers is a group of its own; the largest of either kind is in memory at once.
    layer = 3 * max(sizes.values())
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
            batch = min(SEQUENCES_PER_STEP, sequences)
        scores = max(_scores_kept(layout, stock, batch, length, calibration.steps > 0) for layout in layouts)
        fit = max(fit, scores + (20 if calibration.steps else 8) * 4 * batch * length * width)
    # The last four are never in memory together.
    peak: int = total + layer + hidden + moments + max(search, intermediate, attention_stats, fit)
    return max(peak, RESTING_BYTES + other)


def _scores_kept(layout: Any, stock: Any, sequences: int, length: int, trained: bool) -> int:
    """Return the bytes of attention weights.

    A fused kernel keeps none; it serves layers with keys as wide as values and without a cap on scores.
    """
    if layout.head_dim == layout.v_head_dim and not getattr(stock, "attn_logit_softcapping", None):
        return 0
    return int((3.5 if trained else 2.5) * 4 * sequences * layout.num_attention_heads * length**2)
