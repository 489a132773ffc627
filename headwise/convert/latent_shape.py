"""Rank and rotary width of an MLA target: chosen for a share of the cache, or checked against what a source has."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.convert import engines
from headwise.convert.layout import AttentionLayout
from headwise.errors import HeadwiseError

# Rotary key that every MLA kernel takes.
WIDEST_ROPE = 64


def choose_shape(
    layouts: Sequence[AttentionLayout], share: float, *, whole_planes: bool, notes: list[str]
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
        HeadwiseError: the share is too small.
    """
    wanted = round(share * max(layout.cache_numbers for layout in layouts))
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
    wish = min(numbers / 4, turning.rotary_dim, WIDEST_ROPE)
    rope_dim = max((p for p in splits if p <= wish), default=min(splits))
    return numbers - rope_dim, rope_dim


def check_shape(layouts: Sequence[AttentionLayout], rank: int, rope_dim: int) -> None:
    """Raises HeadwiseError, with the legal range, for a shape that the source cannot fill."""
    most_rank, most_rope = (max(sizes) for sizes in zip(*map(widest_shape, layouts), strict=True))
    for name, value, most in (("--rank", rank, most_rank), ("--rope-dim", rope_dim, most_rope)):
        if value < 2 or value % 2 or value > most:
            source = layouts[0].cache_numbers
            options = ", ".join(
                f"{r} + {p} ({(r + p) / source:.0%})"
                for r, p in ((most_rank * n // 8 // 2 * 2, most_rope * n // 16 // 2 * 2) for n in (1, 2, 4))
                if r > 1 and p > 1
            )
            raise HeadwiseError(
                f"{name} {value} is not an even number from 2 to {most}, which is all this model has.",
                f"Rank + rope dim, and the share of the cache they keep: {options}.",
            )


def widest_shape(layout: AttentionLayout) -> tuple[int, int]:
    """The largest (rank, rope_dim) that brings anything: all keys and values as latent, all planes turning."""
    groups = layout.num_key_value_heads
    return groups * (layout.head_dim + layout.v_head_dim), groups * layout.rotary_dim
