"""Launch the decode kernels as one custom operator of torch, with tiles and splits chosen for the device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headwise.cuda import current
from headwise.errors import HeadwiseError
from headwise.kernels.decode import portable
from headwise.kernels.decode.latent_fp8 import BLOCK
from headwise.kernels.decode.tiling import (
    Card,
    Config,
    card_of,
    choose_merge,
    choose_splits,
    choose_tiles,
    chunks,
    fp8_copies,
    hopper,
    hopper_fp8,
    hopper_wide,
    latent_chunks,
)

NO_WINDOW = 2**30


@torch.library.custom_op("headwise::attend", mutates_args=())
def attend(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    starts: Tensor | None,
    block_table: Tensor | None,
    window: int | None,
    k_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `launch_attend` with the tiles of `choose_tiles`, as one operator that torch.compile does not enter.

    Args:
        q: as of `launch_attend`, and so are the others.
        q_rope: rotary part of the queries.
        k: keys.
        k_rope: rotary keys.
        v: values.
        scale: of the scores.
        lengths: tokens in the cache of each sequence.
        starts: first visible token of each sequence.
        block_table: pages of each sequence.
        window: sliding window in tokens.
        k_scale: scales of FP8 keys.

    Returns:
        Output and log-sum-exp.

    Raises:
        HeadwiseError: the card is older than sm_80, or than sm_89 with FP8 keys.
    """
    needed = (8, 0) if k_scale is None else (8, 9)
    if q.is_cuda and card_of(q.device.index).capability < needed:
        name = torch.cuda.get_device_name(q.device)
        if torch.version.hip:
            raise HeadwiseError(
                f"The decode kernels on FP8 latents run on NVIDIA cards, and this is {name}.",
                "Set HEADWISE_KERNELS=reference.",
            )
        kernels = "decode kernels" if k_scale is None else "decode kernels on FP8 latents"
        raise HeadwiseError(
            f"{name} is too old for the {kernels}, which need compute capability {needed[0]}.{needed[1]}.",
            "Set HEADWISE_KERNELS=reference.",
        )
    with current(q.device):
        return launch_attend(q, q_rope, k, k_rope, v, scale, lengths, starts, block_table, window, k_scale)


@attend.register_fake
def _(
    q: Tensor, q_rope: Tensor | None, k: Tensor, k_rope: Tensor | None, v: Tensor | None, *_masks: Any
) -> tuple[Tensor, Tensor]:
    value = k if v is None else v
    return q.new_empty(*q.shape[:3], value.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _can_copy(cache: Tensor) -> bool:
    """Return whether every row of a cache begins at a multiple of 16 bytes, as `hopper_fp8` copies it."""
    strides = (stride * cache.element_size() for stride in cache.stride()[:2])
    return cache.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)


def is_aligned(tensor: Tensor) -> bool:
    """Return whether Triton copies the rows of a tensor 16 bytes at a time: their strides are multiples of 16.

    Args:
        tensor: of half precision; its last dimension is dense.
    """
    return tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in tensor.stride()[:-1])


def copyable(q: Tensor) -> Tensor:
    """Return queries that `hopper_wide` can copy 16 bytes at a time.

    Args:
        q: (batch, queries, heads, width), the last dimension dense.
    """
    return q if is_aligned(q) else q.clone(memory_format=torch.contiguous_format)


def card_for(card: Card, k: Tensor, k_rope: Tensor | None, v: Tensor | None, *, fp8: bool) -> Card:
    """Return the card, or one before Hopper if its kernels cannot copy these caches, so that `portable` runs.

    Args:
        card: the device.
        k: keys, as of `launch_attend`, and so are the others.
        k_rope: rotary keys.
        v: values.
        fp8: whether keys are in FP8.
    """
    caches = [cache for cache in (k, k_rope, v) if cache is not None]
    if all(map(_can_copy if fp8 else is_aligned, caches)):
        return card
    return replace(card, capability=min(card.capability, (8, 9)))


def launch_attend(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor | None,
    scale: float,
    lengths: Tensor | None,
    starts: Tensor | None,
    block_table: Tensor | None,
    window: int | None,
    k_scale: Tensor | None = None,
    config: Config | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the decode kernel, and the merge of its splits.

    Args:
        q: (batch, queries, heads, head_dim).
        q_rope: (batch, queries, heads, rope_dim); None: no rotary part.
        k: (batch, capacity, groups, head_dim), or (pages, page_size, groups, head_dim) with a block table.
        k_rope: as `k`, one group, rope_dim numbers.
        v: as `k`, v_head_dim numbers; None: the value is `k`.
        scale: of the scores.
        lengths: (batch) int32, tokens in the cache; None: capacity.
        starts: (batch) int32, first visible token; None: 0.
        block_table: (batch, max_pages) int32, the page of each run of page_size tokens.
        window: sliding window in tokens, the token itself counted.
        k_scale: as `k` without groups, one float32 for each block of 128 numbers; `k` is e4m3, and its own value.
        config: the tiles; None: `choose_tiles`.
        num_splits: of the keys; None: `choose_splits`.

    Returns:
        The output (batch, queries, heads, v_head_dim) in the type of `q`, and the float32 log-sum-exp
        (batch, queries, heads).
    """
    batch, queries, heads, head_dim = q.shape
    groups = k.shape[2]
    value_dim = head_dim if v is None else v.shape[3]
    rope_dim = 0 if k_rope is None else k_rope.shape[3]
    per_group = heads // groups
    page = 0 if block_table is None else k.shape[1]
    capacity = k.shape[1] if block_table is None else block_table.shape[1] * page
    card = card_of(q.device.index if q.is_cuda else None)
    fp8 = k_scale is not None
    if config is None:
        card = card_for(card, k, k_rope, v, fp8=fp8)
        shape = (queries * per_group, head_dim, rope_dim, value_dim, v is None, fp8)
        config = choose_tiles(card, *shape, positive_scale=scale > 0)
        if fp8 and config.hopper and not fp8_copies.box_rows(k, k_rope, page, config.keys):
            config = choose_tiles(card, *shape, boxes=False)
    if config.wide:
        q, q_rope = copyable(q), None if q_rope is None else copyable(q_rope)
    # The consumers of FP8 keys share their rows, and so do those of `hopper_wide`.
    row_tiles = -(-queries * per_group // (config.rows * (1 if fp8 or config.wide else config.consumers)))
    if num_splits is None:
        longest = min(capacity, (window or capacity) + queries - 1)
        num_splits = choose_splits(batch * groups * row_tiles, longest, config, card.multiprocessors)

    rows = batch * queries * heads
    out = torch.empty(batch, queries, heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    parts, part_lse = out, lse
    if num_splits > 1:
        parts = torch.empty(num_splits, rows, value_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(num_splits, rows, dtype=torch.float32, device=q.device)
    v = k if v is None else v
    rope_unit = 8 if fp8 and config.hopper else 1
    strides = (
        *q.stride()[:3],
        *(q_rope.stride()[:3] if q_rope is not None else (0, 0, 0)),
        *k.stride()[:3],
        *(stride // rope_unit for stride in (k_rope.stride()[:2] if k_rope is not None else (0, 0))),
        *v.stride()[:3],
        *(k_scale.stride()[:2] if k_scale is not None else (0, 0)),
        block_table.stride(0) if block_table is not None else 0,
        *(rows * value_dim, queries * heads * value_dim, heads * value_dim, value_dim),
        *(rows, queries * heads, heads),
    )
    arguments = (
        q, q_rope, k, k_rope, v, k_scale, lengths, starts, block_table, parts, part_lse,
        scale * math.log2(math.e), *strides, queries, per_group, capacity, window or NO_WINDOW,
    )  # fmt: skip
    widest = BLOCK if fp8 else None
    head: Any = chunks(head_dim, widest)
    value: Any = chunks(value_dim, widest)
    if config.hopper and not fp8 and v is k:
        head = value = latent_chunks(head_dim)
    options: dict[str, Any] = dict(
        HEAD=head, ROPE=chunks(rope_dim), VALUE=value, VALUE_IS_KEY=v is k,
        ROWS=config.rows, KEYS=config.keys, PAGE=page, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    grid = (num_splits, groups * row_tiles, batch)
    if config.hopper:
        kernel = hopper_fp8.attend if fp8 else hopper_wide.attend if config.wide else hopper.attend
        if k_scale is not None:
            options |= fp8_copies.copy_options(k, k_rope, k_scale, page, config.keys)
        kernel[grid](*arguments, **options, CONSUMERS=config.consumers, maxnreg=config.registers)
    else:
        portable.attend[grid](*arguments, **options)
    if num_splits > 1:
        splits, width = choose_merge(rows, value_dim, num_splits, card.multiprocessors)
        early = {"launch_pdl": True} if config.hopper else {}
        portable.merge[(rows, -(-value_dim // width))](
            parts, part_lse, out, lse, num_splits, rows, value_dim,
            SPLITS=splits, WIDTH=width, EARLY=config.hopper, **early,
        )  # fmt: skip
    return out, lse
