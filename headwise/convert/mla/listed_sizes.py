"""Choose the sizes of MLA that `inspect` lists for a model with heads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from headwise.convert.mla.shape import check_shape, choose_shape, source_cache
from headwise.errors import SettingError
from headwise.models.layout import AttentionLayout
from headwise.serving.engines import heads_fit, nearest_cache_row, rope_dims, rope_dims_to_try

# Pairs (kv_lora_rank, qk_rope_head_dim) with cache rows that engines support (serving/engines.yaml).
LATENTS = ((256, 64), (448, 64), (512, 64))
OTHERS = "`headwise convert MODEL OUT --to mla` takes others, with `--cache`, or with `--rank` and `--rope-dim`."


def latent_sizes(
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
    first = next((layout for layout in layouts if layout.rotary_dim), None)
    if first is None:
        return None
    wanted = round(0.5 * source_cache(layouts))
    fits = engines or heads_fit(layouts[0].head_dim, layouts[0].v_head_dim)
    size = nearest_cache_row(wanted, engines) if fits else wanted // 2 * 2
    if (legal := rope_dims(engines)) is None:
        splits = rope_dims_to_try(size, first.rotary_dim, first.num_key_value_heads)
    else:
        splits = [dim for dim in sorted(legal) if dim < min(first.num_key_value_heads * first.rotary_dim + 1, size)]
    try:
        shape = choose_shape(layouts, hidden_size, 0.5, size, splits)
        check_shape(layouts, hidden_size, *shape)
    except SettingError:
        return None
    return shape


def latent_note(listed: bool) -> str:
    """Return what the user should know about the sizes of MLA that are listed, or about those that are not.

    Args:
        listed: whether a size is listed.
    """
    return (
        f"The sizes of MLA are examples. {OTHERS}"
        if listed
        else f"MLA is possible, and no size of it is listed. {OTHERS}"
    )
