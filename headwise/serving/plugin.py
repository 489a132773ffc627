"""What the plugins for serving engines have in common: the release that they know, and decode on pages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from headwise.kernels import mla_decode
from headwise.kernels.dispatch import supports_triton, uses_hopper_kernel

LOG = logging.getLogger(__name__)


def install_plugin(engine: str, package: str, release: str, replace: Callable[[], None]) -> None:
    """Replace parts of an engine, or log a warning that states why they stay; the engine starts in any case.

    Args:
        engine: its name, for the message.
        package: its distribution.
        release: whose sources the parts were written for; in another one nothing changes.
        replace: registers the parts.
    """
    try:
        found = version(package)
    except PackageNotFoundError:  # a build under another name
        found = "of unknown version"
    if found != release:
        LOG.warning("headwise changes nothing in %s %s: its plugin was written for %s.", engine, found, release)
        return
    try:
        replace()
    except (ImportError, AttributeError) as error:
        warn_of_missing_part(engine, release, error)


def warn_of_missing_part(engine: str, release: str, error: Exception) -> None:
    """Log that an engine of the right release lacks a part, as another build does.

    Args:
        engine: its name.
        release: whose sources the parts were written for.
        error: that names the part.
    """
    LOG.warning("headwise changes nothing in this %s, which lacks a part of %s: %s", engine, release, error)


def runs_hopper_kernel(query: Tensor, cache_dtype: torch.dtype, rank: int) -> bool:
    """Return whether the Hopper kernel decodes these queries on a cache.

    An FP8 cache with one scale is the engine's: the kernel takes scales of blocks and half-precision rotary keys.

    Args:
        query: (..., kv_lora_rank + qk_rope_head_dim).
        cache_dtype: of the cache.
        rank: kv_lora_rank.
    """
    rope_dim = query.shape[-1] - rank
    return (
        cache_dtype == query.dtype
        and supports_triton(query, rank, rope_dim, rank)
        and uses_hopper_kernel(query, rank, rope_dim, is_latent=True)
    )


def decode_on_pages(
    query: Tensor, cache: Tensor, rank: int, *, scale: float, lengths: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend from the newest tokens of each sequence to a paged cache, whose rows end with the rotary key.

    Args:
        query: (batch, S, heads, kv_lora_rank + qk_rope_head_dim), in absorbed form.
        cache: (pages, page_size, kv_lora_rank + qk_rope_head_dim).
        rank: kv_lora_rank.
        scale: of the scores.
        lengths: (batch) int32, tokens in the cache.
        block_table: (batch, max_pages) int32. The number of splits of the keys follows from its width.

    Returns:
        As `mla_decode`.
    """
    return mla_decode(
        query[..., :rank],
        query[..., rank:],
        cache[..., :rank],
        cache[..., rank:],
        scale=scale,
        lengths=lengths,
        block_table=block_table,
    )
