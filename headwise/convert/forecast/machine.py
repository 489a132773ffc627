"""Time the operations of a conversion on this machine: products of matrices, attention, small tensor operations.

Each operation is timed for some hundredths of a second and once in a process. The least of a few runs counts, so
that other work on the machine does not change a decision. GPUs are not timed: their rates are constants.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.calibration.attention_stats import AttentionStats
from headwise.convert.refit.regression import forecast_flops, sequences_per_step
from headwise.models.norm_free import pad_values
from headwise.models.protocol import AttentionModel
from headwise.models.stock import empty_model, layer_arguments, stock_config

# Seconds of repeats of an operation, and the fewest and the most repeats.
LEAST, FEWEST, MOST = 0.03, 3, 50
# A first run that takes so many seconds counts, and is the only one.
LONG = 0.25
# What the clock cannot tell from nothing counts as so many seconds.
TICK = 1e-8
# The largest order of a timed product, and the operations of a timed pass of attention.
ORDER, ATTENTION_FLOPS = 512, 6e9
# Elements of a timed operation on single elements, as many as fit into a cache: (heads, n, n).
ELEMENTS = (8, 128, 128)


def clock() -> float:
    """Return the present time in seconds.

    On one thread it is the time of the processor, which leaves out when other processes had it.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def best_seconds(work: Callable[[], object]) -> float:
    """Return the least seconds that a piece of work takes, after a first run that counts only if it is long.

    Args:
        work: is called several times.
    """
    start = clock()
    work()
    if (first := clock() - start) > LONG:
        return first
    times: list[float] = []
    while len(times) < FEWEST or (sum(times) < LEAST and len(times) < MOST):
        start = clock()
        work()
        times.append(clock() - start)
    return max(min(times), TICK)


def product_rate(dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    """Return the floating-point operations in a second of a product of matrices on the CPU.

    Args:
        dtype: of the matrices.
        rows: of the left matrix; sizes beyond `ORDER` have the rate of that size.
        inner: columns of the left matrix.
        columns: of the right matrix.
    """
    return _product_rate(dtype, *(min(ORDER, size) for size in (rows, inner, columns)), torch.get_num_threads())


@cache
def _product_rate(dtype: torch.dtype, rows: int, inner: int, columns: int, _threads: int) -> float:
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    return 2 * rows * inner * columns / best_seconds(lambda: left @ right)


@cache
def element_seconds() -> float:
    """Return the seconds for one element of a complex operation on single elements, on one thread."""
    left, right = torch.ones(ELEMENTS, dtype=torch.complex128), torch.ones(ELEMENTS, dtype=torch.complex128)
    return best_seconds(lambda: left * right) / left.numel()


@cache
def call_seconds() -> float:
    """Return the seconds of one call of torch, whose result is small."""
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    return best_seconds(lambda: [left * right for _ in range(100)]) / 100


def attention_seconds(
    config: dict[str, Any], stock: AttentionModel, layer: int, length: int, kind: str
) -> float | None:
    """Return the seconds for one token of a layer's attention on the CPU, timed with random weights.

    Args:
        config: of the model.
        stock: names of its stock class.
        layer: index of the layer.
        length: tokens in a sequence.
        kind: "forward"; "trained": a step of the regression; "stats": attention statistics of one sequence.

    Returns:
        The seconds; None for a module that takes more than hidden states and positions.
    """
    if stock.reads_pairs or stock.cross_states(config):
        return None
    layout, width = stock.layouts(config)[layer], stock_config(config).get_text_config().hidden_size

    def flops(tokens: int) -> float:  # of one token in a sequence of so many
        return forecast_flops(layout.num_parameters(width), layout.num_attention_heads, layout.head_dim, 1, tokens)

    # A shorter sequence stands for one that takes seconds: most of its time is then spent on products with weights.
    timed = max(16, min(length, int(ATTENTION_FLOPS / flops(length))))
    place = (stock.auto_class, stock.module, stock.attention_path(layer), layer)
    try:
        seconds = _attention_seconds(
            json.dumps(config, sort_keys=True), place, timed, kind, torch.get_num_threads()
        )
    except Exception:  # a stock class may need arguments that are not known here, and raise anything without them
        return None
    return seconds / timed * flops(length) / flops(timed)


@cache
def _attention_seconds(
    config: str, place: tuple[str, str, str, int], length: int, kind: str, _threads: int
) -> float:
    auto_class, layers, path, layer = place
    model = empty_model(json.loads(config), auto_class)
    arguments: dict[str, Any] = layer_arguments(model, layers, length, torch.float32)[layer]
    attention: Any = model.get_submodule(path)
    _fill(attention, trained=kind == "trained")
    pad_values(attention)
    sequences = sequences_per_step("cpu", length) if kind == "trained" else 1
    inputs = torch.randn(sequences, length, model.get_input_embeddings().embedding_dim)

    def run() -> Tensor:
        output: Any = attention(hidden_states=inputs, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    if kind == "trained":
        optimizer = torch.optim.Adam(attention.parameters())

        def step() -> None:
            run().square().mean().backward()
            optimizer.step()

        return best_seconds(step) / sequences
    with torch.no_grad():
        if kind == "forward":
            return best_seconds(run)
        return best_seconds(lambda: AttentionStats().add(attention, inputs, arguments))


def _fill(module: nn.Module, *, trained: bool) -> None:
    """Give a module on the meta device random weights."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            weight = torch.randn(parameter.shape) / max(1, parameter.shape[-1]) ** 0.5
            setattr(owner, name, nn.Parameter(weight, requires_grad=trained))
