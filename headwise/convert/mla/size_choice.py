"""Choose the size of MLA for a share of the cache and the engines, and the sizes that `inspect` lists."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from headwise.convert.mla.shape import check_shape, choose_shape, source_cache
from headwise.errors import SettingError
from headwise.models.layout import AttentionLayout
from headwise.serving.engines import cache_rows, heads_fit, nearest_cache_row, rope_dims, rope_dims_to_try
from headwise.serving.kernel_shapes import fits_padded_prefill

# Pairs (kv_lora_rank, qk_rope_head_dim) with cache rows that engines support (serving/engines.yaml).
LATENTS = ((256, 64), (448, 64), (512, 64))
OTHERS = "`headwise convert MODEL OUT --to mla` takes others, with `--cache`, or with `--rank` and `--rope-dim`."


def shape_for_share(
    layouts: Sequence[AttentionLayout],
    hidden_size: int,
    share: float,
    engines: Collection[str],
    *,
    planes: bool = False,
    v_head_dim: int = 0,
) -> tuple[int, int]:
    """Return the rank and the rotary width for a share of the source's cache.

    The row is one that engines have kernels for, if heads fit and it is near.

    Args:
        layouts: of the source's layers.
        hidden_size: of the source.
        share: of the source's cache, as the user gave it.
        engines: names of the engines to serve; empty: no width is chosen for one.
        planes: whether the method keeps whole rotary planes of every KV head.
        v_head_dim: the smallest width of the values.

    Raises:
        SettingError: the share is too small or too large, or an engine takes none of its rotary keys.
    """
    wanted = round(share * source_cache(layouts))
    fits = heads_fit(layouts[0].head_dim, max(layouts[0].v_head_dim, v_head_dim))
    size = nearest_cache_row(wanted, engines) if engines or fits else wanted // 2 * 2
    widths = _rope_dims(layouts, size, engines, planes, v_head_dim)
    return choose_shape(layouts, hidden_size, share, size, widths)


def _rope_dims(
    layouts: Sequence[AttentionLayout], size: int, engines: Collection[str], planes: bool, v_head_dim: int
) -> list[int]:
    """Return the widths of the rotary key to choose from, for a cache row of `size`."""
    first = next(layout for layout in layouts if layout.rotary_dim)
    groups = first.num_key_value_heads
    step, limit = 2 * groups if planes else 2, groups * first.rotary_dim
    legal = rope_dims(engines)
    planar = range(step, min(limit, size // 2) + 1, step)
    every = list(planar) if planes else rope_dims_to_try(size, first.rotary_dim, groups)
    if legal is None:
        return every
    fitting = sorted(legal.intersection(range(step, min(limit, size - 2) + 1, step)))
    if not fitting:  # with the plugin of headwise the engine takes other widths
        nope = first.head_dim - (first.rotary_dim if first.kv_lora_rank is not None else 0)
        value = max(first.v_head_dim, v_head_dim)
        fitting = [dim for dim in every if fits_padded_prefill(nope, dim, value)]
    if not fitting:
        named, widths = ", ".join(engines), ", ".join(map(str, sorted(legal)))
        whole = source_cache(layouts)
        rows = [row for row in cache_rows(engines) if min(legal) < row < whole]
        least = f"Give a `cache` of at least {math.ceil(1000 * min(rows) / whole) / 10:g}%, or l" if rows else "L"
        reason = (
            f"a row of {size} elements is not longer than it"
            if size <= min(legal)
            else f"{groups} KV heads of {first.rotary_dim} rotary dimensions cannot fill it in a row of {size}"
        )
        raise SettingError(
            "engines",
            f"`engines` {named}: the rotary key has {widths} elements there, and {reason}.",
            f"{least}eave out the engine.",
        )
    return fitting


def listed_sizes(
    layouts: Sequence[AttentionLayout], hidden_size: int, engines: Collection[str]
) -> list[tuple[int, int]]:
    """Return the pairs (kv_lora_rank, qk_rope_head_dim) to list, from the smallest cache to the largest.

    These are half of the source's cache, and the rows for which engines have kernels. Some may save nothing.

    Args:
        layouts: of the source's layers.
        hidden_size: of the source.
        engines: names of the engines to serve; empty: all of them.
    """
    half = _half(layouts, hidden_size, engines)
    return sorted({*LATENTS, *([half] if half else [])}, key=lambda pair: (sum(pair), pair))


def _half(layouts: Sequence[AttentionLayout], hidden_size: int, engines: Collection[str]) -> tuple[int, int] | None:
    """Return the shape that `cache` 0.5 selects; None: the model or an engine takes none."""
    if not any(layout.rotary_dim for layout in layouts):
        return None
    try:
        shape = shape_for_share(layouts, hidden_size, 0.5, engines)
        check_shape(layouts, hidden_size, *shape)
    except SettingError:
        return None
    return shape


def sizes_note(listed: bool) -> str:
    """Return what the user should know about the sizes of MLA that are listed, or about those that are not.

    Args:
        listed: whether a size is listed.
    """
    return (
        f"{'The sizes of MLA are examples' if listed else 'MLA is possible, and no size of it is listed'}. {OTHERS}"
    )
