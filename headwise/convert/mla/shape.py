"""Choose the rank and the rotary width of an MLA model for a share of the cache, or check given ones."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.convert.mla.exact import exact_mla_shape
from headwise.errors import SettingError
from headwise.models.layout import AttentionLayout

# The widest rotary key that every MLA kernel takes.
MAX_KERNEL_ROPE_DIM = 64


def source_cache(layouts: Sequence[AttentionLayout]) -> int:
    """Return the cache elements per token of the source's widest layer.

    Args:
        layouts: of the source's layers.
    """
    return max(layout.cache_elements_per_token for layout in layouts)


def choose_shape(
    layouts: Sequence[AttentionLayout], hidden_size: int, share: float, size: int, rope_dims: Sequence[int]
) -> tuple[int, int]:
    """Split a cache row into a latent and a rotary key.

    A quarter goes to the rotary key, at most a head's rotary width and what engines have kernels for: of the splits
    tried on real models the best at every size. The expected error is no guide here: for the embedded model at an
    eighth of its cache it prefers 32 + 32, whose damage is half as much again (docs/decisions/0006).

    Args:
        layouts: of the source's layers.
        hidden_size: of the source.
        share: of the source's cache, as the user gave it.
        size: cache elements per token and layer to split, near that share.
        rope_dims: widths of the rotary key to choose from; the first layer with RoPE has some of them.

    Returns:
        (rank, rope_dim), with the sum `size`.

    Raises:
        SettingError: the share is too small for a rotary key, or larger than what the model can use.
    """
    source = source_cache(layouts)
    if not rope_dims:
        raise SettingError(
            "cache",
            f"`cache` {share:.4g} leaves {round(share * source)} elements per token and layer, too few for a "
            "rotary key.",
            "Give more.",
        )
    max_rope_dim, max_rank = max(rope_dims), widest_shape(layouts, hidden_size)[0]
    possible = [p for p in rope_dims if size - p <= max_rank]
    if not possible or size >= source:
        most = min(max_rank + max_rope_dim, source - 2)
        raise SettingError(
            "cache",
            f"`cache` {share:.4g} leaves {size} elements per token and layer; the model can use {most}: a latent "
            f"of at most {max_rank}, a rotary key of at most {max_rope_dim}, and fewer than its own {source}.",
            f"Give at most {most / source:.1%}, or `exact`, which keeps them all.",
        )
    rotary_dim = next(layout.rotary_dim for layout in layouts if layout.rotary_dim)
    wanted = min(size / 4, rotary_dim, MAX_KERNEL_ROPE_DIM)
    rope_dim = max((p for p in possible if p <= wanted), default=min(possible))
    return size - rope_dim, rope_dim


def check_shape(layouts: Sequence[AttentionLayout], hidden_size: int, rank: int, rope_dim: int) -> None:
    """Check that the source can fill a shape, and that the shape saves cache.

    Args:
        layouts: of the source's layers.
        hidden_size: of the source.
        rank: of the latent.
        rope_dim: width of the rotary key.

    Raises:
        SettingError: it cannot, or it does not; the message has the legal range.
    """
    max_rank, max_rope_dim = widest_shape(layouts, hidden_size)
    source = source_cache(layouts)
    options = ", ".join(
        f"{r} + {p} ({(r + p) / source:.0%})"
        for r, p in ((max_rank * n // 8 // 2 * 2, max_rope_dim * n // 16 // 2 * 2) for n in (1, 2, 4))
        if r > 1 and p > 1
    )
    hint = f"Rank + rope dim, and the share of the cache they keep: {options}."
    for field, value, most in (("rank", rank, max_rank), ("rope_dim", rope_dim, max_rope_dim)):
        if value < 2 or value % 2 or value > most:
            raise SettingError(
                field, f"`{field}` {value} is not an even number from 2 to {most}, the limit of this model.", hint
            )
    exact = (max(sizes) for sizes in zip(*map(exact_mla_shape, layouts), strict=True))
    whole = all(given >= full for given, full in zip((rank, rope_dim), exact, strict=True))
    if whole or rank + rope_dim > source:
        raise SettingError(
            "rank",
            f"`rank` {rank} and `rope_dim` {rope_dim} cache {rank + rope_dim} elements per token and layer, where "
            f"the model itself caches {source}.",
            f"{hint} `exact` keeps them all.",
        )


def widest_shape(layouts: Sequence[AttentionLayout], hidden_size: int) -> tuple[int, int]:
    """Return the largest useful rank and rotary width.

    A latent needs no more elements than all keys and values have, nor than the hidden state that they are made of.
    A rotary key needs no more than all rotary planes.

    Args:
        layouts: of the source's layers.
        hidden_size: of the source.
    """
    rank = max(layout.num_key_value_heads * (layout.head_dim + layout.v_head_dim) for layout in layouts)
    rope_dim = max(layout.num_key_value_heads * layout.rotary_dim for layout in layouts)
    return min(rank, hidden_size // 2 * 2), rope_dim
