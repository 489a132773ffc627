"""Forecast the seconds of the stages of a conversion, from shapes and from timings of this machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from headwise.convert.calibration.layer_stream import NUM_ATTENTION_SEQUENCES
from headwise.convert.forecast.machine import attention_seconds, call_seconds, element_seconds, product_rate
from headwise.convert.refit.output_projection import FOLDS
from headwise.convert.refit.regression import CHECKED, forecast_flops, sequences_per_step
from headwise.convert.sparse.warm_up import indexer_flops
from headwise.io.reader import Checkpoint
from headwise.models.layout import IndexerShape
from headwise.models.protocol import AttentionModel, find_attention_model

# Longest calibration sequence: how far attention looks is measured on it.
CALIBRATION_LENGTH = 1024
# Sustained rates of one H200 on models of 135M parameters, on the low side of what was measured: of a forward pass,
# and of closed forms.
CUDA_FORWARD_FLOPS, CUDA_LAYER_FLOPS = 3e13, 5e12
# Seconds of a call of torch in a closed form there, and of a step of the regression by its launches or operations.
CUDA_CALL, CUDA_STEP, CUDA_TRAINED_FLOPS = 8e-6, 7e-3, 2.8e14
# Work of the MLA search: passes over (heads, cache row, cache row), calls of torch, and products of the search with
# the moments. Counted from its code; the passes and the calls fit the timings of three models
# (docs/results/convert-speed.md).
SEARCH_PASSES, SEARCH_CALLS, SEARCH_PRODUCTS = 1200, 50_000, 60
# Work of a merge of heads: products of all rows with a moment, and calls of torch.
MERGE_PRODUCTS, MERGE_CALLS = 4, 3_000
# Passes over the scores of an indexer on a CPU, beside their product: the stock class writes and scales them,
# applies ReLU, sums them over the heads and selects. Each costs as much as the timed operation on as many elements.
SCORE_PASSES = 5
# Share of the rate of a product that small layers sustain on a CPU, where they are counted and not timed.
SUSTAINED = 0.15
# Bytes of weights read and written in a second, measured on two cores.
FILE_RATE = 2.5e8


def forward_seconds(
    checkpoint: Checkpoint, tokens: int, device: torch.device, length: int = CALIBRATION_LENGTH
) -> float:
    """Return the forecast seconds of a forward pass with logits, without the scores of indexers.

    Args:
        checkpoint: the model.
        tokens: of the text.
        device: where the model runs.
        length: tokens in a sequence.
    """
    if device.type == "cuda":
        return 2.0 * checkpoint.num_parameters * tokens / CUDA_FORWARD_FLOPS
    return _forward_seconds(checkpoint, checkpoint.num_parameters, tokens, length)


def index_score_seconds(shape: IndexerShape, length: int, device: torch.device) -> float:
    """Return the forecast seconds in which one stock indexer scores all tokens of a sequence for all its queries.

    Args:
        shape: of the indexer.
        length: tokens in the sequence.
        device: where it runs.
    """
    scores, width = float(shape.index_n_heads * length**2), shape.index_head_dim
    if device.type == "cuda":
        return 2.0 * scores * width / CUDA_FORWARD_FLOPS
    product = 2.0 * width / product_rate(torch.float32, length, width, length)
    return scores * (product + SCORE_PASSES * element_seconds())


def calibration_seconds(
    checkpoint: Checkpoint, arch: AttentionModel, tokens: int, length: int, device: torch.device
) -> float:
    """Return the forecast seconds of running text through the layers and taking their moments.

    Args:
        checkpoint: the source.
        arch: its row.
        tokens: of the text.
        length: tokens in a sequence.
        device: where the layers run.
    """
    if device.type == "cuda":
        return forward_seconds(checkpoint, tokens, device)
    layers = [i for i, layout in enumerate(arch.layouts(checkpoint.config)) if layout.attends]
    width: int = arch.stock_config(checkpoint.config).hidden_size
    prefix = arch.layers[0].partition("{")[0]
    inside = sum(math.prod(entry.shape) for name, entry in checkpoint.tensors.items() if name.startswith(prefix))
    moments = 2.0 * len(layers) * tokens * width**2 / product_rate(torch.float32, width, tokens, width)
    viewed = min(tokens, NUM_ATTENTION_SEQUENCES * length)
    stats = viewed * _attention(checkpoint.config, arch, layers, length, "stats")
    return _forward_seconds(checkpoint, inside, tokens, length) + moments + stats


def closed_form_seconds(checkpoint: Checkpoint, arch: AttentionModel, target: Any, device: torch.device) -> float:
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
    before = arch.layouts(checkpoint.config)
    products = passes = calls = 0.0
    for i, layout in enumerate(target.layouts):
        if not target.converted_names(i):
            continue
        rows = (before[i].num_attention_heads + 2 * before[i].num_key_value_heads) * before[i].head_dim
        if layout.kv_lora_rank is None or target.exact:
            products, calls = products + MERGE_PRODUCTS * 2.0 * rows * width**2, calls + MERGE_CALLS
        else:
            row = layout.cache_elements_per_token
            products += 2.0 * width**2 * (MERGE_PRODUCTS * rows + SEARCH_PRODUCTS * row)
            passes += SEARCH_PASSES * layout.num_attention_heads * row**2
            calls += SEARCH_CALLS
    if device.type == "cuda":
        return (products + 8 * passes) / CUDA_LAYER_FLOPS + calls * CUDA_CALL
    rate = product_rate(torch.float64, width, width, width)
    return products / rate + passes * element_seconds() + calls * call_seconds()


def output_seconds(
    checkpoint: Checkpoint, arch: AttentionModel, target: Any, tokens: int, length: int, device: torch.device
) -> float:
    """Return the forecast seconds of solving for the output matrices of every converted layer.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        tokens: of the text.
        length: tokens in a sequence.
        device: where the layers run.
    """
    width, layers = arch.stock_config(checkpoint.config).hidden_size, _converted(target)
    flops = 0.0
    for i in layers:
        heads = target.layouts[i].num_attention_heads * target.layouts[i].v_head_dim
        flops += 2.0 * tokens * heads * (heads + width) + (FOLDS + 1) * (2 / 3 * heads**3 + 2.0 * heads**2 * width)
    if device.type == "cuda":
        return flops / CUDA_LAYER_FLOPS
    forward = _attention(target.config, _child(target), layers, length, "forward")
    return tokens * forward + flops / product_rate(torch.float32, width, tokens, width)


def refit_seconds(
    checkpoint: Checkpoint, arch: AttentionModel, target: Any, steps: int, length: int, device: torch.device
) -> float:
    """Return the forecast seconds of the regression of every converted layer.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        steps: of each layer.
        length: tokens in a calibration sequence.
        device: where the layers are trained.
    """
    tokens = sequences_per_step(device, length) * length
    if device.type == "cuda":
        width = arch.stock_config(checkpoint.config).hidden_size
        flops = [tokens * _flops(target.layouts[i], width, length, 1.0) for i in _converted(target)]
        return CHECKED * steps * sum(max(CUDA_STEP, each / CUDA_TRAINED_FLOPS) for each in flops)
    return CHECKED * steps * tokens * trained_seconds(target, length)


def indexer_seconds(arch: AttentionModel, target: Any, steps: int, length: int, device: torch.device) -> float:
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
    return flops / (
        CUDA_LAYER_FLOPS if device.type == "cuda" else product_rate(torch.float32, length, width, width)
    )


def trained_seconds(target: Any, length: int) -> float:
    """Return the forecast seconds for a token of a forward and a backward pass of all converted attention on a CPU.

    Args:
        target: the decided conversion.
        length: tokens in a sequence.
    """
    return _attention(target.config, _child(target), _converted(target), length, "trained")


def _converted(target: Any) -> list[int]:
    return [i for i in range(len(target.layouts)) if target.converted_names(i)]


def _child(target: Any) -> AttentionModel:
    return find_attention_model(target.config, [tensor.name for tensor in target.outputs])


def _forward_seconds(checkpoint: Checkpoint, parameters: int, tokens: int, length: int) -> float:
    """Return the seconds of a forward pass on the CPU through weights that hold those of the attention."""
    arch = find_attention_model(checkpoint.config, checkpoint.tensors)
    layouts, width = arch.layouts(checkpoint.config), arch.stock_config(checkpoint.config).hidden_size
    layers = [i for i, layout in enumerate(layouts) if layout.attends]
    attention = sum(layouts[i].num_parameters(width) for i in layers)
    other = 2.0 * max(0, parameters - attention) / product_rate(torch.float32, tokens, width, 4 * width)
    return tokens * (other + _attention(checkpoint.config, arch, layers, length, "forward"))


def _attention(
    config: dict[str, Any], stock: AttentionModel, layers: Iterable[int], length: int, kind: str
) -> float:
    """Return the seconds for a token of the attention of some layers on the CPU; one of each layout is timed."""
    layouts, layers = stock.layouts(config), list(layers)
    first = {layouts[i]: i for i in reversed(layers)}
    counts = Counter(layouts[i] for i in layers)
    total = 0.0
    for layout, count in counts.items():
        seconds = attention_seconds(config, stock, first[layout], length, kind)
        if seconds is None:
            width = layout.num_attention_heads * layout.head_dim
            share = 1.0 if kind == "trained" else 1 / 3
            rate = SUSTAINED * product_rate(torch.float32, length, width, width)
            seconds = _flops(layout, width, length, share) / rate
        total += count * seconds
    return total


def _flops(layout: Any, width: int, length: int, share: float) -> float:
    """Return the operations for a token of a forward and a backward pass of one layer's attention, or a share."""
    return share * forecast_flops(
        layout.num_parameters(width), layout.num_attention_heads, layout.head_dim, 1, length
    )
