"""State what a conversion saves on each GPU of tensor parallelism, for its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headwise.models.layout import AttentionLayout, caches
from headwise.serving.planner import cache_elements, count_heads, refuse_parallelism
from headwise.serving.settings import ServingSettings

# Degrees of tensor parallelism at which a result is compared with its source, and those that a plan shows.
DEGREES = (2, 4, 8, 16)
SHOWN = (2, 4, 8)


@dataclass(frozen=True)
class GpuCache:
    """The KV cache of one token on each GPU.

    Attributes:
        tp: GPUs of tensor parallelism.
        before: bytes of the source; None: this degree does not divide its KV heads.
        after: bytes of the result; None likewise.
    """

    tp: int
    before: float | None
    after: float | None


def gpu_caches(
    before: Sequence[AttentionLayout], after: Sequence[AttentionLayout], size_before: int, size_after: int
) -> Iterator[GpuCache]:
    """Yield the cache on each GPU at every shown degree that divides the query heads.

    Args:
        before: layouts of the source.
        after: layouts of the result.
        size_before: bytes of a cache element of the source.
        size_after: bytes of a cache element of the result.
    """
    for tp in SHOWN:
        if any(layout.num_attention_heads % tp for layout in caches([*before, *after])):
            continue
        old, new = _cache_bytes(before, tp, size_before), _cache_bytes(after, tp, size_after)
        if old is not None or new is not None:
            yield GpuCache(tp, old, new)


def _cache_bytes(layouts: Sequence[AttentionLayout], tp: int, itemsize: int) -> float | None:
    """Return the cache of one token on each GPU; None where engines do not divide the KV heads."""
    if refuse_parallelism(layouts, ServingSettings(tp=tp)) is not None:
        return None
    return itemsize * sum(cache_elements(layout, tp) for layout in caches(layouts))


def unpaid_degree(before: AttentionLayout, after: AttentionLayout) -> str | None:
    """Return a note about the tensor parallelism from which a result saves no cache on a GPU.

    Args:
        before: a layer of the source.
        after: the same layer of the result.

    Returns:
        The note; None if the result saves cache at every degree that the query heads allow, or at none.
    """
    if before.kind == "mla" or cache_elements(after) >= cache_elements(before):
        return None
    for tp in DEGREES:
        old, new = cache_elements(before, tp), cache_elements(after, tp)
        if before.num_attention_heads % tp or new < old:
            continue
        start = f"From tensor parallel {tp} on, "
        if after.kind == "mla":
            return (
                f"{start}MLA saves no cache: each GPU caches {new:,.0f} elements per token and layer, and "
                f"{old:,.0f} of the source. Decode context parallelism divides the latent."
            )
        return (
            f"{start}{count_heads(after.num_key_value_heads)} save no cache on a GPU: engines repeat KV heads, so "
            f"each GPU caches one KV head, as it does for the source with {before.num_key_value_heads}."
        ).replace("1 KV head save", "1 KV head saves")
    return None
