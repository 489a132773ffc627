"""Rank and rotary width of an MLA target: chosen for a share of the cache, or checked against what a source has."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.convert.mla.latent import lift_shape
from headwise.errors import HeadwiseError
from headwise.models.layout import AttentionLayout
from headwise.serving import engines

# Rotary key that every MLA kernel takes.
WIDEST_ROPE = 64


def choose_shape(
    layouts: Sequence[AttentionLayout], hidden_size: int, share: float, *, whole_planes: bool, notes: list[str]
) -> tuple[int, int]:
    """A share of the source's cache as (rank, rope_dim), in a size engines accept where one is near.

    A quarter for the rotary key, at most a head's rotary width and what engines have kernels for: of the splits
    tried on real models the best at every size. The expected error is no guide here: for the embedded model at
    an eighth of its cache it prefers 32 + 32, whose damage is half as much again (docs/decisions/006).

    Args:
        layouts: of the source's layers.
        whole_planes: every KV head is to keep as many planes of its own.
        notes: told where the size is not what was asked for.

    Raises:
        HeadwiseError: the share is too small, or more than a latent and a rotary key can make use of.
    """
    source = max(layout.cache_elements_per_token for layout in layouts)
    wanted = round(share * source)
    numbers = engines.nearest_cache(wanted)
    if numbers not in (wanted, wanted - 1):
        notes.append(f"Cache rows of {numbers} numbers, which engines have kernels for, in place of {wanted}.")
    turning = next(layout for layout in layouts if layout.rotary_dim)
    groups = turning.num_key_value_heads
    splits = [p for _, p in engines.splits(numbers, turning.rotary_dim, groups)]
    if whole_planes:
        splits = list(range(2 * groups, min(groups * turning.rotary_dim, numbers // 2) + 1, 2 * groups))
    if not splits:
        raise HeadwiseError(
            f"--cache {share:.4g} leaves {wanted} numbers per token and layer, too few for a rotary key.",
            "Ask for more.",
        )
    widest, most_rank = max(splits), widest_shape(layouts, hidden_size)[0]
    splits = [p for p in splits if numbers - p <= most_rank]
    if not splits or numbers >= source:
        most = min(most_rank + widest, source - 2)
        raise HeadwiseError(
            f"--cache {share:.4g} leaves {numbers} numbers per token and layer; the model can use {most}: "
            f"a latent of at most {most_rank}, a rotary key of at most {widest}, and fewer than its own {source}.",
            f"Ask for at most {most / source:.1%}, or for --exact, which keeps them all.",
        )
    wish = min(numbers / 4, turning.rotary_dim, WIDEST_ROPE)
    rope_dim = max((p for p in splits if p <= wish), default=min(splits))
    return numbers - rope_dim, rope_dim


def check_shape(layouts: Sequence[AttentionLayout], hidden_size: int, rank: int, rope_dim: int) -> None:
    """Raises HeadwiseError, with the legal range, for a shape that the source cannot fill."""
    most_rank, most_rope = widest_shape(layouts, hidden_size)
    source = max(layout.cache_elements_per_token for layout in layouts)
    options = ", ".join(
        f"{r} + {p} ({(r + p) / source:.0%})"
        for r, p in ((most_rank * n // 8 // 2 * 2, most_rope * n // 16 // 2 * 2) for n in (1, 2, 4))
        if r > 1 and p > 1
    )
    hint = f"Rank + rope dim, and the share of the cache they keep: {options}."
    for name, value, most in (("--rank", rank, most_rank), ("--rope-dim", rope_dim, most_rope)):
        if value < 2 or value % 2 or value > most:
            raise HeadwiseError(
                f"{name} {value} is not an even number from 2 to {most}, which is all this model has.", hint
            )
    lift = map(max, zip(*map(lift_shape, layouts), strict=True))
    whole = all(given >= full for given, full in zip((rank, rope_dim), lift, strict=True))
    if whole or rank + rope_dim > source:
        raise HeadwiseError(
            f"--rank {rank} and --rope-dim {rope_dim} cache {rank + rope_dim} numbers per token and layer, "
            f"where the model itself caches {source}.",
            f"{hint} --exact keeps them all.",
        )


def widest_shape(layouts: Sequence[AttentionLayout], hidden_size: int) -> tuple[int, int]:
    """The largest (rank, rope_dim) that brings anything: all keys and values as latent, or all that they are made
    of; all planes turning."""
    rank = max(layout.num_key_value_heads * (layout.head_dim + layout.v_head_dim) for layout in layouts)
    rope_dim = max(layout.num_key_value_heads * layout.rotary_dim for layout in layouts)
    return min(rank, hidden_size // 2 * 2), rope_dim
