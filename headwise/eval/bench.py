"""Time decoding and prefill of a converted model beside its parent, and measure cache and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from headwise import compat
from headwise.cuda import record
from headwise.environment import find_device
from headwise.errors import HeadwiseError
from headwise.eval.bench_settings import BenchSettings
from headwise.fields import settings_of
from headwise.format import size
from headwise.io.reader import read_headers
from headwise.io.source import find_source
from headwise.kernels.patch import disable, enable, enabled
from headwise.models.stock import load_model
from headwise.models.table import require_decoder
from headwise.progress import SILENT, Progress

# Share of the memory for activations, logits and the allocator, beside weights and cache.
RESERVE = 0.04
# Positions of the cache that warm-up and graph capture use.
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class DecodeSpeed:
    """Speed and memory of one model at one batch size.

    Attributes:
        model: the model as it was given.
        batch: sequences decoded together.
        context: tokens in the cache.
        decode_tokens_per_second: tokens of all sequences.
        seconds_per_step: median seconds of one decode step.
        prefill_seconds: median seconds to prefill one sequence of `context` tokens.
        cache_bytes: bytes of the KV cache.
        weight_bytes: bytes of the parameters.
        peak_bytes: peak GPU memory; None on a CPU.
    """

    model: str
    batch: int
    context: int
    decode_tokens_per_second: float
    seconds_per_step: float
    prefill_seconds: float
    cache_bytes: int
    weight_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class BenchResult:
    """Speed of parent and child.

    Attributes:
        same_batch: parent and child at the same batch size.
        equal_memory: parent and child, each at the largest batch size that fits `memory_bytes`; empty if it was not
            measured.
        memory_bytes: memory that each model may use; None if `equal_memory` is empty.
        device: where the models ran.
    """

    same_batch: list[DecodeSpeed]
    equal_memory: list[DecodeSpeed]
    memory_bytes: int | None
    device: str

    @property
    def speedup(self) -> float:
        """Return the child's decode throughput over the parent's, at equal memory if it was measured."""
        parent, child = self.equal_memory or self.same_batch
        return child.decode_tokens_per_second / parent.decode_tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the speedup."""
        return {**asdict(self), "speedup": self.speedup}


def bench_model(
    child: str | Path,
    baseline: str | Path,
    *,
    context: int | str = 1024,
    batch: int = 1,
    memory: int | str | None = None,
    device: str | None = None,
    dtype: str = "bfloat16",
    steps: int = 16,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> BenchResult:
    """Load parent and child one after the other and time both with the decode kernels enabled.

    Args:
        child: a folder, or `org/name[@revision]`.
        baseline: the parent, a folder or `org/name[@revision]`.
        context: tokens in the cache while decoding, such as 8192 or "8K".
        batch: sequences decoded together.
        memory: bytes of weights, cache and activations that each model may use, a number or a word such as "24GB";
            None: no measurement at equal memory.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        dtype: precision of the weights, "bfloat16", "float16" or "float32".
        steps: number of timed decode steps; the median counts.
        revision: branch, tag or commit of the baseline.
        token: token of the Hub.
        progress: receives the downloads.

    Returns:
        Speed and memory of both models.

    Raises:
        SettingError: a setting is not legal, or this machine does not have the device.
        HeadwiseError: not even one sequence fits into `memory`.
    """
    given = locals()
    settings = BenchSettings(**{name: given[name] for name in settings_of(BenchSettings)})
    length = settings.context
    where, precision = find_device(settings.device), getattr(torch, settings.dtype)
    limit: Any = settings.memory
    same_batch, equal_memory = [], []
    found = [
        find_source(source, revision=at, token=token, progress=progress)
        for source, at in ((baseline, revision), (child, None))
    ]
    for each in found:
        require_decoder(each.name, each.config, "timed")
    for source, each in zip((baseline, child), found, strict=True):
        checkpoint = read_headers(each)
        model: Any = load_model(checkpoint, "AutoModelForCausalLM", precision).to(where).eval()
        same_batch.append(time_decoding(model, str(source), length, batch, steps))
        if limit is not None:
            fitting = largest_batch(model, str(source), length, limit)
            equal_memory.append(time_decoding(model, str(source), length, fitting, steps))
        del model
    return BenchResult(same_batch, equal_memory, limit, str(where))


def largest_batch(model: PreTrainedModel, name: str, context: int, memory: int) -> int:
    """Compute how many sequences fit into memory beside the weights and a reserve for activations.

    Args:
        model: a stock model.
        name: name of the model for the error message.
        context: tokens in the cache of a sequence.
        memory: bytes that the model may use.

    Returns:
        The number of sequences, at least 1.

    Raises:
        HeadwiseError: not even one sequence fits.
    """
    with torch.no_grad():
        sequence_bytes = _cache_bytes(_make_cache(model, 1, context))
    weight_bytes = _weight_bytes(model)
    batch = int((memory * (1 - RESERVE) - weight_bytes) // sequence_bytes)
    if batch < 1:
        needed = (weight_bytes + sequence_bytes) / (1 - RESERVE)
        raise HeadwiseError(
            f"{name} with one sequence of {context} tokens needs {size(needed)}, more than {size(memory)}.",
            "Raise `memory` or lower `context`.",
        )
    return batch


@torch.no_grad()
def time_decoding(model: PreTrainedModel, name: str, context: int, batch: int, steps: int = 16) -> DecodeSpeed:
    """Time decode steps of a batch of sequences on a full cache, and the prefill of one sequence.

    The cache is static and filled with noise, because its content does not change the work. On CUDA a step is one
    graph, as in serving. The kernels are enabled during the measurement.

    Args:
        model: a stock model.
        name: name of the model in the result.
        context: tokens in the cache.
        batch: sequences decoded together.
        steps: number of timed steps; the median counts.

    Returns:
        Speed and memory.
    """
    was_enabled = enabled(model)
    enable(model)
    try:
        prefill = _prefill_seconds(model, context)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cache = _make_cache(model, batch, context + steps + WARM_UP_TOKENS)
        compat.fill_static_cache(cache, context)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        arguments = compat.cache_argument(model, cache)

        def step() -> None:
            ids.copy_(model(ids, **arguments, logits_to_keep=1).logits.argmax(-1))

        seconds = statistics.median(_time(record(step, model.device), steps, model.device.type))
        peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
        return DecodeSpeed(
            model=name,
            batch=batch,
            context=context,
            decode_tokens_per_second=batch / seconds,
            seconds_per_step=seconds,
            prefill_seconds=prefill,
            cache_bytes=_cache_bytes(cache),
            weight_bytes=_weight_bytes(model),
            peak_bytes=peak,
        )
    finally:
        if not was_enabled:
            disable(model)


def _prefill_seconds(model: PreTrainedModel, context: int) -> float:
    ids = torch.zeros(1, context, dtype=torch.long, device=model.device)

    def prefill() -> None:
        model(ids, logits_to_keep=1, use_cache=False)

    repeats = 3 if model.device.type == "cuda" else 1
    prefill()
    return statistics.median(_time(prefill, repeats, model.device.type))


def _time(call: Callable[[], Any], repeats: int, device: str) -> list[float]:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def _make_cache(model: PreTrainedModel, batch: int, capacity: int) -> StaticCache:
    """Make a static cache with allocated memory; a one-token forward pass gives its shapes."""
    shaped = StaticCache(config=model.config, max_cache_len=4)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **compat.cache_argument(model, shaped))
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    compat.allocate_static_cache(cache, shaped, batch)
    return cache


def _cache_bytes(cache: StaticCache) -> int:
    return sum(tensor.nbytes for tensor in compat.cache_tensors(cache))


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in {*model.parameters()})
