"""Speed and memory of a converted model beside its parent: decode, prefill, cache, peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from headwise.errors import HeadwiseError
from headwise.format import size
from headwise.io.source import locate
from headwise.kernels.patch import disable, enable, enabled
from headwise.progress import SILENT, Progress

# Room for activations, logits and the allocator beside weights and cache, as a fraction of the memory allowed.
RESERVE = 0.04


@dataclass(frozen=True)
class Speed:
    """One model at one batch. Times in seconds, sizes in bytes; `peak_bytes` is None on CPU."""

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
class Bench:
    """Parent and child at the same batch, and each at the largest batch that fits `memory_bytes`."""

    same_batch: list[Speed]
    equal_memory: list[Speed]
    memory_bytes: int | None
    device: str

    @property
    def speedup(self) -> float:
        """The child's decode throughput over the parent's, at equal memory when it was measured."""
        parent, child = self.equal_memory or self.same_batch
        return child.decode_tokens_per_second / parent.decode_tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup}


def bench_model(
    child: str | Path,
    baseline: str | Path,
    *,
    context: int = 1024,
    batch: int = 1,
    memory: int | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 16,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Bench:
    """Load parent and child one after the other and measure both with the decode kernels enabled.

    Args:
        child, baseline: folders, or `org/name[@revision]`; `revision` is the baseline's.
        context: tokens in the cache while decoding.
        batch: sequences decoded together.
        memory: bytes of weights, cache and work that each model may use; None: no measurement at equal memory.
        device: "cuda" or "cpu"; None: CUDA when it is there.
        steps: decode steps timed (the median counts).

    Raises:
        HeadwiseError: not even one sequence fits into `memory`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    same, equal = [], []
    for source, at in ((baseline, revision), (child, None)):
        folder = locate(source, revision=at, token=token, progress=progress).folder
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        model = model.to(device).eval()
        same.append(measure(model, str(source), context, batch, steps))
        if memory is not None:
            fitting = largest_batch(model, str(source), context, memory)
            equal.append(measure(model, str(source), context, fitting, steps))
        del model
    return Bench(same, equal, memory, device)


def largest_batch(model: PreTrainedModel, name: str, context: int, memory: int) -> int:
    """How many sequences fit beside the weights: `memory` less a reserve for activations.

    Raises:
        HeadwiseError: none fits.
    """
    with torch.no_grad():
        sequence = _cache_bytes(_cache(model, 1, context))
    weights = _weight_bytes(model)
    batch = int((memory * (1 - RESERVE) - weights) // sequence)
    if batch < 1:
        needed = (weights + sequence) / (1 - RESERVE)
        raise HeadwiseError(
            f"{name} with one sequence of {context} tokens needs {size(needed)}, more than {size(memory)}.",
            "Raise --memory or lower --context.",
        )
    return batch


@torch.no_grad()
def measure(model: PreTrainedModel, name: str, context: int, batch: int, steps: int = 16) -> Speed:
    """Decode `steps` tokens for each of `batch` sequences on a full cache, and prefill one sequence.

    The cache is a static one filled with noise (what it holds does not change the work); on CUDA a step is one
    graph, as in serving. The kernels are enabled for the measurement and the model is left as it was.
    """
    was_enabled = enabled(model)
    enable(model)
    try:
        prefill = _prefill_seconds(model, context)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cache = _cache(model, batch, context + steps + 4)
        for layer in _layers(cache):
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

        def step() -> None:
            ids.copy_(model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1))

        seconds = statistics.median(_timed(_recorded(step, model.device.type), steps, model.device.type))
        peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
        return Speed(
            name, batch, context, batch / seconds, seconds, prefill, _cache_bytes(cache), _weight_bytes(model), peak
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
    return statistics.median(_timed(prefill, repeats, model.device.type))


def _recorded(step: Callable[[], None], device: str) -> Callable[[], Any]:
    """The step as a CUDA graph; on CPU the step itself."""
    step()
    if device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _timed(call: Callable[[], Any], repeats: int, device: str) -> list[float]:
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


def _cache(model: PreTrainedModel, batch: int, capacity: int) -> StaticCache:
    """A static cache with its memory in place, shaped by a one-token forward pass of the model itself."""
    shapes = StaticCache(config=model.config, max_cache_len=4)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=shapes)
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    for layer, shaped in zip(_layers(cache), _layers(shapes), strict=True):
        keys, values = (t.new_empty(batch, t.shape[1], 1, t.shape[3]) for t in (shaped.keys, shaped.values))
        layer.lazy_initialization(keys, values)
    return cache


def _layers(cache: StaticCache) -> list[Any]:
    return cache.layers


def _cache_bytes(cache: StaticCache) -> int:
    return sum(t.nbytes for layer in _layers(cache) for t in (layer.keys, layer.values))


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in {*model.parameters()})
