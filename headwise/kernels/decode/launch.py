"""Choosing tiles and splits, and launching: plain numbers in, plain numbers out, so that all of it tests on CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.kernels.decode import portable

try:
    from headwise.kernels.decode import hopper
except ImportError:  # Gluon's interface moves between Triton releases; the portable kernel serves everything.
    hopper = None  # type: ignore[assignment]

NO_WINDOW = 2**30
# Work of a split that does not grow with its keys (start-up, first copies, epilogue), in key tiles.
SPLIT_OVERHEAD = 2


@dataclass(frozen=True)
class Card:
    """What the choice of tiles needs to know of a device."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class Config:
    """One way to run the kernel.

    `rows` query rows and `keys` keys make one tile; `consumers` groups of warps take `rows` each (Hopper);
    `resident` programs share a multiprocessor, for which `registers` caps each thread's.
    """

    hopper: bool
    rows: int
    keys: int
    warps: int
    stages: int
    consumers: int = 1
    resident: int = 1
    registers: int | None = None


@cache
def card_of(index: int | None) -> Card:
    """The card behind a CUDA device index; a small imaginary one on CPU (None), for the interpreter."""
    if index is None:
        return Card((8, 0), 4, 166912)
    properties: Any = torch.cuda.get_device_properties(index)
    # AMD numbers its cards anew: its 9.0 and 9.4 are no Hopper, and the portable kernel is theirs.
    amd = torch.version.hip is not None
    return Card(
        (8, 0) if amd else (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def chunks(width: int) -> tuple[tuple[int, int], ...]:
    """(start, power of two) pieces that cover a width exactly: 448 -> (0, 256), (256, 128), (384, 64)."""
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < width:
        piece = 1 << ((width - start).bit_length() - 1)
        pieces.append((start, piece))
        start += piece
    return tuple(pieces)


@cache
def choose(card: Card, rows: int, head: int, rope: int, value: int, value_is_key: bool) -> Config:
    """Tiles for `rows` query rows that read one group of keys.

    Args:
        rows: query tokens times heads per group.
        head, rope, value: numbers per key in the key, the rotary key (0: none) and the value.
        value_is_key: the value is the key itself (MLA), so it is copied once.
    """
    row_bytes = 2 * (head + rope + (0 if value_is_key else value))
    query_bytes = 2 * (head + rope)
    power = 1 << (rows - 1).bit_length()
    if card.capability[0] == 9 and hopper is not None and value % 64 == 0:
        tile = min(32, max(8, power))
        while tile * value > 32 * 512:
            tile //= 2
        # Measured order of preference: more rows to a tile of keys, then longer tiles, then a third stage.
        for consumers in (2, 1) if rows > tile else (1,):
            for keys in (128, 64) if tile >= 16 else (64,):
                stages = 3 if keys * row_bytes <= 49152 else 2
                shared = stages * keys * row_bytes + consumers * tile * (query_bytes + 2 * keys) + 2048
                if shared <= card.shared_memory:
                    two = tile == 8 and 2 * shared <= card.shared_memory
                    return Config(True, tile, keys, 4, stages, consumers, 2 if two else 1, 128 if two else None)
    tile = min(32 if value > 256 else 64, max(16, power))
    keys = 64 if row_bytes <= 512 else 32
    while keys > 16 and 2 * keys * row_bytes + tile * query_bytes > card.shared_memory:
        keys //= 2
    return Config(False, tile, keys, 8 if tile * value >= 32 * 256 else 4, 2)


def choose_splits(programs: int, keys: int, config: Config, multiprocessors: int) -> int:
    """Splits of the keys that finish first: whole waves of programs, each wave as long as its tiles.

    Args:
        programs: programs that one split launches (batch times groups times row tiles).
        keys: the longest sequence.
    """
    tiles = max(1, -(-keys // config.keys))
    slots = multiprocessors * config.resident

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * (-(-tiles // splits) + SPLIT_OVERHEAD) + (1 if splits > 1 else 0)

    return min(range(1, min(tiles, max(1, 32 * slots // programs), 256) + 1), key=cost)


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
) -> tuple[Tensor, Tensor]:
    """`run` with its own choice of tiles, as one operation that torch.compile leaves whole.

    Raises:
        HeadwiseError: a card before sm_80.
    """
    if q.is_cuda and card_of(q.device.index).capability < (8, 0):
        name = torch.cuda.get_device_name(q.device)
        raise HeadwiseError(
            f"{name} is too old for the decode kernels, which need compute capability 8.0.",
            "Set HEADWISE_KERNELS=reference.",
        )
    return run(q, q_rope, k, k_rope, v, scale, lengths, starts, block_table, window)


@attend.register_fake
def _(q, q_rope, k, k_rope, v, *_masks):
    value = k if v is None else v
    return q.new_empty(*q.shape[:3], value.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def run(
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
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        q, q_rope: (batch, queries, heads, head or rope numbers).
        k, v: (batch, capacity, groups, numbers), or (pages, page size, groups, numbers) with a block table;
            `v` None: the value is `k`.
        k_rope: as `k`, one group.
        config, splits: override the choice (benchmarks, tests).

    Returns:
        (batch, queries, heads, value numbers) in the type of `q`, and float32 log-sum-exp (batch, queries, heads).
    """
    batch, queries, heads, head = q.shape
    groups = k.shape[2]
    value = head if v is None else v.shape[3]
    rope = 0 if k_rope is None else k_rope.shape[3]
    per_group = heads // groups
    page = 0 if block_table is None else k.shape[1]
    capacity = k.shape[1] if block_table is None else block_table.shape[1] * page
    card = card_of(q.device.index if q.is_cuda else None)
    if config is None:
        config = choose(card, queries * per_group, head, rope, value, v is None)
    row_tiles = -(-queries * per_group // (config.rows * config.consumers))
    if splits is None:
        longest = min(capacity, (window or capacity) + queries - 1)
        splits = choose_splits(batch * groups * row_tiles, longest, config, card.multiprocessors)

    rows = batch * queries * heads
    out = torch.empty(batch, queries, heads, value, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=q.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(splits, rows, value, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    v = k if v is None else v
    strides = (
        *q.stride()[:3],
        *(q_rope.stride()[:3] if q_rope is not None else (0, 0, 0)),
        *k.stride()[:3],
        *(k_rope.stride()[:2] if k_rope is not None else (0, 0)),
        *v.stride()[:3],
        block_table.stride(0) if block_table is not None else 0,
        *(rows * value, queries * heads * value, heads * value, value),
        *(rows, queries * heads, heads),
    )
    arguments = (
        q, q_rope, k, k_rope, v, lengths, starts, block_table, parts, part_lse,
        scale * math.log2(math.e), *strides, queries, per_group, capacity, window or NO_WINDOW,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        HEAD=chunks(head), ROPE=chunks(rope), VALUE=chunks(value), VALUE_IS_KEY=v is k,
        ROWS=config.rows, KEYS=config.keys, PAGE=page, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    grid = (splits, groups * row_tiles, batch)
    if config.hopper:
        hopper.attend[grid](*arguments, **options, CONSUMERS=config.consumers, maxnreg=config.registers)
    else:
        portable.attend[grid](*arguments, **options)
    if splits > 1:
        # Few rows: spread each over several programs, so that a batch of one still fills the card.
        width = 128 if rows * -(-value // 512) < 2 * card.multiprocessors else 1 << (value - 1).bit_length()
        early = {"launch_pdl": True} if config.hopper else {}
        portable.merge[(rows, -(-value // width))](
            parts, part_lse, out, lse, splits, rows, value,
            SPLITS=min(16, 1 << (splits - 1).bit_length()), WIDTH=width, EARLY=config.hopper, **early,
        )  # fmt: skip
    return out, lse
