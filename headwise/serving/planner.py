"""Forecast what a layout costs on each GPU: cache, weights, concurrent sequences and the time of a decode step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from headwise.errors import SettingError
from headwise.models.layout import AttentionLayout, caches
from headwise.serving.settings import CACHE_DTYPES, ServingSettings

# The fraction of a GPU's memory that engines use by default (vLLM: gpu_memory_utilization).
USED_MEMORY = 0.9
# The context of a forecast without one.
DEFAULT_CONTEXT = 8192
# Degrees of tensor parallelism at which a conversion to MLA is compared with its source.
DEGREES = (2, 4, 8, 16)


@dataclass(frozen=True)
class ModelSize:
    """The parameters of a model that no layout of its attention changes.

    Attributes:
        hidden_size: width of the residual stream.
        other: parameters outside the attention projections.
        bytes_per_parameter: of the weights.
    """

    hidden_size: int
    other: int
    bytes_per_parameter: int

    @classmethod
    def of(cls, parameters: int, layouts: Sequence[AttentionLayout], hidden_size: int, itemsize: int) -> ModelSize:
        """Return the size of a model.

        Args:
            parameters: of the whole model.
            layouts: of its layers.
            hidden_size: width of the residual stream.
            itemsize: bytes of a parameter.
        """
        attention = sum(attention_parameters(layout, hidden_size, 1) for layout in layouts)
        return cls(hidden_size, max(parameters - attention, 0), itemsize)


@dataclass(frozen=True)
class ServingForecast:
    """What one layout costs on each GPU.

    Attributes:
        cache_bytes_per_token: of one sequence, on one GPU; below a sliding window.
        cache_bytes: of one sequence of `context` tokens, on one GPU.
        weight_bytes: on one GPU; None: the number of parameters is not known.
        context: tokens of a sequence.
        sequences: that fit into the memory together; None: memory or weights are not known.
        seconds_per_step: the shortest decode step with these sequences, or with one sequence where their number is
            not known: the time to read weights and cache once. None without a card.
        tokens_per_second: of all sequences at that time per step, on all GPUs together.
    """

    cache_bytes_per_token: float
    cache_bytes: float
    weight_bytes: int | None
    context: int
    sequences: int | None
    seconds_per_step: float | None
    tokens_per_second: float | None


@cache
def _cards() -> dict[str, Any]:
    import yaml

    table: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath("cards.yaml").read_text("utf-8"))
    cards: dict[str, Any] = table["cards"]
    return cards


def cache_elements(layout: AttentionLayout, tp: int = 1, dcp: int = 1) -> float:
    """Return the cache elements of one layer for one token, on one GPU.

    Tensor parallelism divides KV heads, and repeats them where it has more GPUs. Every GPU holds the whole latent
    of MLA. Decode context parallelism divides what several GPUs hold alike.

    Args:
        layout: of the layer.
        tp: GPUs of tensor parallelism.
        dcp: GPUs that divide the cache of a sequence.
    """
    if layout.kv_lora_rank is not None:
        return layout.cache_elements_per_token / dcp
    heads = max(layout.num_key_value_heads / tp, 1)
    copies = max(tp // layout.num_key_value_heads, 1)
    return heads * (layout.head_dim + layout.v_head_dim) / min(dcp, copies)


def attention_parameters(layout: AttentionLayout, hidden_size: int, tp: int) -> int:
    """Return the parameters of the attention projections of one layer, on one GPU, without biases.

    Args:
        layout: of the layer; of MLA, `head_dim` includes the rotary key.
        hidden_size: width of the residual stream.
        tp: GPUs of tensor parallelism.
    """
    heads, value = layout.num_attention_heads, layout.v_head_dim
    outer = heads * (layout.head_dim + value) * hidden_size // tp
    if layout.kv_lora_rank is None:
        kv_heads = max(layout.num_key_value_heads // tp, 1)
        return outer + kv_heads * (layout.head_dim + value) * hidden_size
    rank, rope_dim = layout.kv_lora_rank, layout.qk_rope_head_dim or 0
    return outer + (rank + rope_dim) * hidden_size + rank * heads * (layout.head_dim - rope_dim + value) // tp


def forecast(
    layouts: Sequence[AttentionLayout],
    model: ModelSize | None,
    settings: ServingSettings,
    context: int | None = None,
) -> ServingForecast:
    """Forecast one layout of a model.

    Args:
        layouts: of every layer.
        model: its other parameters; None: unknown.
        settings: parallelism, memory, cache type and card.
        context: tokens of a sequence; None: `DEFAULT_CONTEXT`.

    Raises:
        SettingError: `tp` does not divide the query heads.
    """
    tp, dcp, length = settings.tp or 1, settings.dcp or 1, context or DEFAULT_CONTEXT
    heads = layouts[0].num_attention_heads
    if heads % tp:
        legal = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise SettingError("tp", f"`tp` {tp} does not divide the {heads} query heads.", f"Give one of {legal}.")
    element = CACHE_DTYPES[settings.cache_dtype or "bf16"]
    cached = caches(layouts)
    sizes = [(cache_elements(layout, tp, dcp) * element, layout.sliding_window or length) for layout in cached]
    per_token = sum(size for size, _ in sizes)
    one = sum(size * min(window, length) for size, window in sizes)
    weights = None
    if model is not None:
        attention = sum(attention_parameters(layout, model.hidden_size, tp) for layout in layouts)
        weights = (model.other // tp + attention) * model.bytes_per_parameter
    card = _cards()[settings.card] if settings.card else None
    memory = settings.memory or (card and int(card["memory"]))
    sequences = None
    if isinstance(memory, int) and weights is not None and one:
        sequences = max(int((memory * USED_MEMORY - weights) // one), 0)
    seconds = rate = None
    if card and weights is not None and sequences != 0:
        batch = sequences or 1
        seconds = (weights + batch * one) / float(card["bandwidth"])
        rate = batch / seconds
    return ServingForecast(per_token, one, weights, length, sequences, seconds, rate)


def serving_notes(
    layout: AttentionLayout,
    others: Sequence[tuple[str, float]],
    source: float,
    settings: ServingSettings,
) -> Iterator[str]:
    """Yield what the user should know before a conversion for these GPUs.

    Args:
        layout: of a layer of the source.
        others: name and cache bytes per token on each GPU of every MLA layout that it can become.
        source: cache bytes per token of the source on each GPU.
        settings: of the forecast.
    """
    tp, groups = settings.tp or 1, layout.num_key_value_heads
    for name, size in others:
        if size >= source:
            yield (
                f"{name} does not pay at tensor parallel {tp}: each GPU caches {size / source:.3g} times what it "
                "caches of the unchanged model, because every GPU holds the whole latent. Decode context "
                "parallelism (`dcp`) divides it."
            )
    if layout.kind != "mla" and tp > groups and tp % groups == 0:
        yield (
            f"The model has {groups} KV heads for {tp} GPUs: engines repeat each head {tp // groups} times. For an "
            f"engine that does not, `headwise convert MODEL OUT --to gqa --groups {tp}` writes them repeated, "
            "exactly."
        )


def unpaid_degree(before: AttentionLayout, after: AttentionLayout) -> str | None:
    """Return a note about the tensor parallelism from which MLA caches more on each GPU than its source.

    Args:
        before: a layer of the source.
        after: the same layer of the result.

    Returns:
        The note; None if MLA pays at every degree that the query heads allow.
    """
    if before.kind == "mla" or after.kind != "mla":
        return None
    row = cache_elements(after)
    for tp in DEGREES:
        if before.num_attention_heads % tp == 0 and cache_elements(before, tp) <= row:
            return (
                f"From tensor parallel {tp} on, MLA saves no cache: each GPU caches {row:,.0f} elements per token "
                f"and layer, and {cache_elements(before, tp):,.0f} of the source. Decode context parallelism "
                "divides the latent."
            )
    return None
