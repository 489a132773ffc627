"""Forecast what a layout costs on each GPU: cache, weights, concurrent sequences and the time of a decode step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import torch

from headwise.errors import SettingError
from headwise.models.deepseek import attention_shapes
from headwise.models.layout import AttentionLayout, caches, state_bytes
from headwise.serving.engine_facts import Deployment
from headwise.serving.settings import CACHE_DTYPES, USED_MEMORY, ServingSettings

# The context of a forecast without one, in models that have positions for so many tokens.
DEFAULT_CONTEXT = 8192
# Tensors of MLA that every GPU of tensor parallelism holds whole.
UNDIVIDED = ("kv_a_proj_with_mqa", "kv_a_layernorm", "q_a_proj", "q_a_layernorm", "o_proj.bias")
# The compute capability from which vLLM's MLA reads an FP8 cache.
FP8_CAPABILITY = 8.9
NO_CONFIG: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ModelSize:
    """The weights of a model that no layout of its attention changes.

    Attributes:
        hidden_size: width of the residual stream.
        other_bytes: of the weights outside the attention projections.
        bytes_per_parameter: of the attention projections.
        expert_bytes: the part of `other_bytes` that belongs to routed experts.
        selected: the share of a layer's routed experts that one token runs.
    """

    hidden_size: int
    other_bytes: int
    bytes_per_parameter: float
    expert_bytes: int = 0
    selected: float = 1.0

    @classmethod
    def of(
        cls,
        parameters: int,
        layouts: Sequence[AttentionLayout],
        hidden_size: int,
        itemsize: int,
        config: Mapping[str, Any] = NO_CONFIG,
        *,
        routed: int = 0,
        selected: float = 1.0,
    ) -> ModelSize:
        """Return the size of a model.

        Args:
            parameters: of the whole model.
            layouts: of its layers.
            hidden_size: width of the residual stream.
            itemsize: bytes of a parameter.
            config: the config.json, of which MLA needs `q_lora_rank` and `attention_bias`.
            routed: parameters of its routed experts.
            selected: the share of a layer's routed experts that one token runs.
        """
        attention = sum(attention_parameters(layout, hidden_size, 1, config) for layout in layouts)
        other = max(parameters - attention, 0)
        return cls(hidden_size, other * itemsize, itemsize, min(routed, other) * itemsize, selected)

    def scaled(self, factor: float) -> ModelSize:
        """Return the size with all weights stored in more or fewer bytes.

        Args:
            factor: the bytes afterwards, for each byte now.
        """
        return replace(
            self,
            other_bytes=round(self.other_bytes * factor),
            bytes_per_parameter=self.bytes_per_parameter * factor,
            expert_bytes=round(self.expert_bytes * factor),
        )

    def experts_read(self, batch: int) -> float:
        """Return the expected share of the routed experts that a decode step reads, with uniform routing.

        Of E experts, of which a token runs k, a batch of B tokens runs E (1 - (1 - k / E)^B).

        Args:
            batch: sequences of the step.
        """
        return float(1 - (1 - self.selected) ** batch)


@dataclass(frozen=True)
class ServingForecast:
    """What one layout costs on each GPU.

    Attributes:
        context: tokens of a sequence.
        refusal: why no server starts with this layout and these settings; then no number is known. Else None.
        cache_bytes_per_token: of one sequence, on one GPU; below a sliding window.
        cache_bytes: of one sequence of `context` tokens, on one GPU, with the states of linear layers.
        weight_bytes: on one GPU; None: the number of parameters is not known.
        usable_memory: bytes of one GPU for weights and caches; None: the memory is not known.
        sequences: that fit into the memory together; None: memory or weights are not known.
        experts_read: the share of the routed experts of a mixture that such a step is expected to read, if routing
            is uniform; None without a card, and for a dense model.
        seconds_per_step: a lower limit for a decode step with these sequences, or with one sequence where their
            number is not known: the time to read cache and weights once, of routed experts the expected share.
            None without a card.
        seconds_for_one: likewise with one sequence, whatever the memory.
        tokens_per_second: an upper limit: of all sequences at that time per step, on all GPUs together.
    """

    context: int
    refusal: str | None = None
    cache_bytes_per_token: float | None = None
    cache_bytes: float | None = None
    weight_bytes: int | None = None
    usable_memory: int | None = None
    sequences: int | None = None
    experts_read: float | None = None
    seconds_per_step: float | None = None
    seconds_for_one: float | None = None
    tokens_per_second: float | None = None


@cache
def _cards() -> dict[str, Any]:
    import yaml

    table: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath("cards.yaml").read_text("utf-8"))
    cards: dict[str, Any] = table["cards"]
    return cards


def deployment_of(settings: ServingSettings) -> Deployment:
    """Return what the settings of a forecast say of the server, for the rules about engines.

    Args:
        settings: of the forecast.
    """
    gpu = _cards()[settings.card]["gpu"] if settings.card else "unknown"
    return Deployment(gpu, settings.cache_dtype or "bf16", (settings.dcp or 1) > 1)


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


def attention_parameters(
    layout: AttentionLayout, hidden_size: int, tp: int, config: Mapping[str, Any] = NO_CONFIG
) -> int:
    """Return the parameters of the attention projections of one layer, on one GPU; of heads without biases.

    Args:
        layout: of the layer; of MLA, `head_dim` includes the rotary key.
        hidden_size: width of the residual stream.
        tp: GPUs of tensor parallelism.
        config: the config.json of MLA, with `q_lora_rank` and `attention_bias`.
    """
    if not layout.attends:
        return 0
    if layout.kv_lora_rank is None:
        kv_heads = max(layout.num_key_value_heads // tp, 1)
        queries_and_output = layout.num_attention_heads * hidden_size // tp
        return (queries_and_output + kv_heads * hidden_size) * (layout.head_dim + layout.v_head_dim)
    shapes = attention_shapes(
        layout, hidden_size, bias=bool(config.get("attention_bias")), q_lora_rank=config.get("q_lora_rank")
    )
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(size if name.startswith(UNDIVIDED) else size // tp for name, size in sizes.items())


def refuse_parallelism(layouts: Sequence[AttentionLayout], settings: ServingSettings) -> str | None:
    """Return why no server serves a layout; None if one does.

    Rules of one engine count where it is the only one that is named, and those of vLLM where none is.

    Args:
        layouts: of every layer.
        settings: parallelism, cache type, card and engines.
    """
    tp, dcp = settings.tp or 1, settings.dcp or 1
    latent = any(layout.kind == "mla" for layout in layouts)
    for layout in () if latent else caches(layouts):
        groups = layout.num_key_value_heads
        if tp % groups and groups % tp:
            return f"tensor parallel {tp} does not divide {count_heads(groups)}, and is no multiple of it"
        if dcp > 1 and (reason := _refuse_division(layout, tp, dcp, settings.engines)) is not None:
            return reason
    capability = _cards()[settings.card].get("capability") if settings.card else None
    old = capability is not None and capability < FP8_CAPABILITY
    if latent and old and settings.cache_dtype == "fp8" and set(settings.engines) == {"vllm"}:
        return f"vLLM's MLA has an FP8 cache from compute capability 8.9 on, and {settings.card} has {capability}"
    return None


def _refuse_division(layout: AttentionLayout, tp: int, dcp: int, engines: Sequence[str]) -> str | None:
    """Return why the named engine does not divide the cache of KV heads; vLLM's reason if none is named."""
    groups = layout.num_key_value_heads
    if set(engines) == {"sglang"}:
        copies = max(tp // groups, 1)
        if copies % dcp:
            return (
                "SGLang 0.5.23 divides the cache only among GPUs that hold the same KV heads, and with "
                f"{count_heads(groups)} at tensor parallel {tp}, "
                + (f"{copies} GPUs repeat each" if copies > 1 else "no two GPUs do")
            )
    elif set(engines) <= {"vllm"}:
        if tp <= groups:
            return (
                f"vLLM 0.33 divides the cache of KV heads only over more GPUs than KV heads, and there are {tp} "
                f"GPUs for {count_heads(groups)}"
            )
        if dcp > tp // groups:
            return f"vLLM 0.33 takes a `dcp` of at most {tp // groups} here, the GPUs that repeat a KV head"
        if layout.queries_per_group % dcp:
            return f"vLLM 0.33 needs a `dcp` that divides {layout.queries_per_group}, the query heads of a KV head"
    return None


def count_heads(num_key_value_heads: int) -> str:
    """Return "1 KV head" or "8 KV heads".

    Args:
        num_key_value_heads: their number.
    """
    return f"{num_key_value_heads} KV head{'' if num_key_value_heads == 1 else 's'}"


def _check_tp(tp: int, layout: AttentionLayout, config: Mapping[str, Any]) -> None:
    """Raise SettingError if tensor parallelism does not divide the query heads or the MLP."""
    heads, groups = layout.num_attention_heads, layout.num_key_value_heads
    any_groups = layout.kind == "mla"
    text = config.get("text_config")
    width = (text if isinstance(text, Mapping) else config).get("intermediate_size")
    inner = width if isinstance(width, int) and width > 0 else 0
    wrong = f"{heads} query heads" if heads % tp else f"intermediate size {inner:,}" if inner % tp else None
    if wrong is not None:
        divisors = (n for n in range(1, heads + 1) if heads % n == 0 and inner % n == 0)
        legal = ", ".join(str(n) for n in divisors if any_groups or n % groups == 0 or groups % n == 0)
        raise SettingError("tp", f"`tp` {tp} does not divide the {wrong}.", f"Give one of {legal}.")


def forecast(
    layouts: Sequence[AttentionLayout],
    model: ModelSize | None,
    settings: ServingSettings,
    context: int | None = None,
    config: Mapping[str, Any] = NO_CONFIG,
) -> ServingForecast:
    """Forecast one layout of a model.

    Args:
        layouts: of every layer.
        model: its other parameters; None: unknown.
        settings: parallelism, memory, cache type and card.
        context: tokens of a sequence; None: `DEFAULT_CONTEXT`.
        config: the config.json of the layout.

    Raises:
        SettingError: `tp` does not divide the query heads or the width of the MLP.
    """
    tp, dcp, length = settings.tp or 1, settings.dcp or 1, context or DEFAULT_CONTEXT
    _check_tp(tp, layouts[0], config)
    if (refusal := refuse_parallelism(layouts, settings)) is not None:
        return ServingForecast(length, refusal)
    element = CACHE_DTYPES[settings.cache_dtype or "bf16"]
    cached = caches(layouts)
    sizes = [(cache_elements(layout, tp, dcp) * element, layout.sliding_window or length) for layout in cached]
    per_token = sum(size for size, _ in sizes)
    one = sum(size * min(window, length) for size, window in sizes)
    one += state_bytes(layouts, torch.bfloat16) / tp
    weights = None
    if model is not None:
        attention = sum(attention_parameters(layout, model.hidden_size, tp, config) for layout in layouts)
        weights = model.other_bytes // tp + round(attention * model.bytes_per_parameter)
    card = _cards()[settings.card] if settings.card else None
    memory = settings.memory or (card and int(card["memory"]))
    usable = int(memory * USED_MEMORY) if isinstance(memory, int) else None
    sequences = None
    if usable is not None and weights is not None and one:
        sequences = max(int((usable - weights) // one), 0)
    found = ServingForecast(length, None, per_token, one, weights, usable, sequences)
    if card is None or model is None or weights is None:
        return found

    def seconds(batch: int) -> float:
        unread = model.expert_bytes / tp * (1 - model.experts_read(batch))
        return float((weights - unread + batch * one) / card["bandwidth"])

    batch = sequences or 1
    return replace(
        found,
        experts_read=model.experts_read(batch) if model.expert_bytes and sequences != 0 else None,
        seconds_per_step=seconds(batch) if sequences != 0 else None,
        seconds_for_one=seconds(1),
        tokens_per_second=batch / seconds(batch) if sequences != 0 else None,
    )


def serving_notes(
    layout: AttentionLayout,
    others: Sequence[tuple[str, float]],
    source: float,
    settings: ServingSettings,
    fewer_heads: Sequence[tuple[str, float]] = (),
) -> Iterator[str]:
    """Yield what the user should know before a conversion for these GPUs.

    Args:
        layout: of a layer of the source.
        others: name and cache bytes per token on each GPU of every MLA layout that it can become.
        source: cache bytes per token of the source on each GPU.
        settings: of the forecast.
        fewer_heads: name and cache bytes per token on each GPU of every layout of fewer KV heads.
    """
    tp, groups = settings.tp or 1, layout.num_key_value_heads
    divides = "A larger `dcp` divides it." if settings.dcp else "Decode context parallelism (`dcp`) divides it."
    for name, size in others:
        if size >= source:
            times = "" if (ratio := f"{size / source:.3g}") == "1" else f"{ratio} times "
            yield (
                f"{name} does not pay at tensor parallel {tp}: each GPU caches {times}as much as of the unchanged "
                f"model, because every GPU holds the whole latent. {divides}"
            )
    unpaid = [name for name, size in fewer_heads if size >= source]
    if unpaid:
        yield (
            f"{_listed(unpaid)} save{'s' * (len(unpaid) == 1)} no cache at tensor parallel {tp}: engines repeat KV "
            f"heads, so each GPU caches as much as of the unchanged model with {count_heads(groups)}."
        )
    if layout.kind != "mla" and tp > groups and tp % groups == 0:
        yield (
            f"The model has {count_heads(groups)} for {tp} GPUs: engines repeat each head {tp // groups} times. "
            f"For an engine that does not, `headwise convert MODEL OUT --to gqa --groups {tp}` writes them "
            "repeated, exactly."
        )


def _listed(names: Sequence[str]) -> str:
    """Return "MQA", or "MQA, GQA-2 and GQA-4"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
