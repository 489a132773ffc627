"""Choose the tiles and the number of splits of the decode kernels, from widths and the device alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from headwise.kernels.decode.latent_fp8 import BLOCK, num_blocks

try:
    from headwise.kernels.decode import fp8_copies as fp8_copies
    from headwise.kernels.decode import hopper as hopper
    from headwise.kernels.decode import hopper_fp8 as hopper_fp8
    from headwise.kernels.decode import hopper_wide as hopper_wide
except ImportError:  # Gluon's interface changes between Triton releases; the portable kernel runs everywhere.
    fp8_copies = hopper = hopper_fp8 = hopper_wide = None  # type: ignore[assignment]

# More tiles than this are never in flight.
FP8_STAGES = 8
WIDE_STAGES = 8
# `hopper_wide` runs with more query rows, at ranks up to the second number. It was faster in all cases that were
# timed (docs/results/kernels.md). Both it and `hopper` compute as much for 33 rows as for 64.
WIDE_ABOVE = 32
WIDE_RANK = 512
# Bytes of shared memory that CUDA takes of each program.
RESERVED = 1024
# The tiles of `hopper_fp8` by the blocks of a latent: keys, warps of a group, groups, programs on a multiprocessor.
# These were the fastest that ran with 32 rows, and with 16. The others are taken where they leave no room for two
# stages, and where keys are copied row by row.
FP8_TILES = {1: (64, 4, 2, 1), 2: (64, 4, 2, 1), 3: (64, 4, 2, 1), 4: (128, 8, 1, 1)}
FP8_TILES_OF_FEW_ROWS = FP8_TILES | {2: (64, 4, 1, 2)}
FP8_TILES_OTHERWISE = (64, 4, 2, 1)
# Work of a split that does not grow with its keys (start-up, first copies, epilogue), in key tiles.
SPLIT_OVERHEAD = 2


@dataclass(frozen=True)
class Card:
    """The properties of a device that the choice of tiles depends on.

    Attributes:
        capability: CUDA compute capability (major, minor).
        multiprocessors: their number.
        shared_memory: bytes that one program may use.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class Config:
    """The tile sizes and launch options of the kernel.

    Attributes:
        hopper: whether the kernel is one for Hopper: `hopper`, `hopper_wide`, or `hopper_fp8` with FP8 keys.
            Otherwise it is `portable.attend`.
        rows: query rows of a tile.
        keys: keys of a tile.
        warps: warps of a program.
        stages: tiles of keys that are copied ahead.
        consumers: groups of warps that take `rows` query rows each; with FP8 keys the groups share the rows and
            take every second tile of keys (Hopper). So do those of `hopper_wide`.
        resident: programs that share a multiprocessor.
        registers: the limit of each thread's registers; None: the compiler's choice.
        wide: whether the kernel is `hopper_wide.attend`.
    """

    hopper: bool
    rows: int
    keys: int
    warps: int
    stages: int
    consumers: int = 1
    resident: int = 1
    registers: int | None = None
    wide: bool = False


@cache
def card_of(index: int | None) -> Card:
    """Return the properties of a CUDA device.

    Args:
        index: of the device; None: the CPU, for which a small fictitious card serves Triton's interpreter.
    """
    if index is None:
        return Card((8, 0), 4, 166912)
    properties: Any = torch.cuda.get_device_properties(index)
    # AMD has numbers of its own: its 9.0 and 9.4 are not Hopper, and run the portable kernel.
    amd = torch.version.hip is not None
    return Card(
        (8, 0) if amd else (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def chunks(width: int, widest: int | None = None) -> tuple[tuple[int, int], ...]:
    """Return (start, power of two) pieces that cover a width: 448 -> (0, 256), (256, 128), (384, 64).

    Args:
        width: numbers to cover.
        widest: the largest piece, a power of two; None: no limit.
    """
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < width:
        piece = min(widest or width, 1 << ((width - start).bit_length() - 1))
        pieces.append((start, piece))
        start += piece
    return tuple(pieces)


def latent_chunks(width: int) -> tuple[tuple[int, ...], ...]:
    """Return `chunks` of a latent for `hopper.attend`, whose last piece is padded to 64 columns.

    A padded piece has a third number, the columns that exist: 160 -> (0, 128), (128, 64, 32).

    Args:
        width: of the latent.
    """
    *whole, (start, piece) = chunks(padded(width))
    exist = width - start
    return (*whole, (start, piece) if exist == piece else (start, piece, exist))


def padded(width: int) -> int:
    """Return the columns of a latent of some width in the shared memory of `hopper.attend`.

    Args:
        width: of the latent.
    """
    return -(-width // 64) * 64


@cache
def choose_tiles(
    card: Card, rows: int, head_dim: int, rope_dim: int, value_dim: int, value_is_key: bool, fp8: bool = False,
    boxes: bool = True, positive_scale: bool = True,
) -> Config:  # fmt: skip
    """Choose the tiles for query rows that read one group of keys.

    Args:
        card: the device.
        rows: query rows, which is query tokens times heads per group.
        head_dim: numbers of a key without its rotary part.
        rope_dim: numbers of the rotary key; 0: none.
        value_dim: numbers of a value.
        value_is_key: whether the value is the key itself (MLA), which is then copied once.
        fp8: whether keys are in FP8, with scales of blocks.
        boxes: whether the copy engine can copy keys in FP8, see `fp8_copies.box_rows`.
        positive_scale: whether the scale of the scores is above 0, as `hopper_wide` and `hopper_fp8` need it.
    """
    row_bytes = 2 * (head_dim + rope_dim + (0 if value_is_key else value_dim))
    query_bytes = 2 * (head_dim + rope_dim)
    power = 1 << (rows - 1).bit_length()
    if fp8 and positive_scale and card.capability[0] == 9 and hopper is not None and head_dim % BLOCK == 0:
        config = _fp8_tiles(card, min(32, max(16, power)), head_dim, rope_dim, boxes)
        if config is not None:
            return config
    if not fp8 and card.capability[0] == 9 and hopper is not None and (value_is_key or value_dim % 64 == 0):
        config = None
        if value_is_key and positive_scale and rows > WIDE_ABOVE:
            config = _wide_tiles(card, head_dim, rope_dim)
        if config is None:
            config = _hopper_tiles(card, rows, head_dim, rope_dim, value_dim, value_is_key)
        if config is not None:
            return config
    tile = min(32 if value_dim > 256 else 64, max(16, power))
    keys = 64 if row_bytes <= 512 else 32
    while keys > 16 and 2 * keys * row_bytes + tile * query_bytes > card.shared_memory:
        keys //= 2
    return Config(False, tile, keys, 8 if tile * value_dim >= 32 * 256 else 4, 2)


def _hopper_tiles(
    card: Card, rows: int, head_dim: int, rope_dim: int, value_dim: int, value_is_key: bool
) -> Config | None:
    """Return the tiles of `hopper.attend`; None: the card has no room for two tiles of 64 keys."""
    if value_is_key:
        head_dim = value_dim = padded(head_dim)
    row_bytes = 2 * (head_dim + rope_dim + (0 if value_is_key else value_dim))
    query_bytes = 2 * (head_dim + rope_dim)
    tile = min(32, max(8, 1 << (rows - 1).bit_length()))
    while tile * value_dim > 32 * 512:
        tile //= 2
    # Measured order of preference: more rows to a tile of keys, then longer tiles, then a third stage.
    for consumers in (2, 1) if rows > tile else (1,):
        for keys in (128, 64) if tile >= 16 else (64,):
            stages = 3 if keys * row_bytes <= 49152 else 2
            shared = stages * keys * row_bytes + consumers * tile * (query_bytes + 2 * keys) + 2048
            if shared <= card.shared_memory:
                two = tile == 8 and 2 * shared <= card.shared_memory
                return Config(True, tile, keys, 4, stages, consumers, 2 if two else 1, 128 if two else None)
    return None


def _wide_tiles(card: Card, head_dim: int, rope_dim: int) -> Config | None:
    """Return the tiles of `hopper_wide.attend`, with as many stages as fit; None: the latent does not suit it."""
    if head_dim % 64 or not 128 <= head_dim <= WIDE_RANK:
        return None
    # Each group computes the scores of a tile of half of `keys`, and the queries are as large as such a tile.
    tile = 64 * 2 * (head_dim + rope_dim)
    # The weights of a tile (64 rows, 64 keys) take the place of its rotary keys, or have one of their own.
    weights = 0 if rope_dim == 64 else 64 * 64 * 2
    # Then vectors and barriers.
    stages = min(WIDE_STAGES, (card.shared_memory - tile - 4096) // (tile + weights))
    return Config(True, 64, 128, 4, stages, consumers=2, wide=True) if stages >= 2 else None


def _fp8_tiles(card: Card, rows: int, head_dim: int, rope_dim: int, boxes: bool) -> Config | None:
    """Return the tiles of `hopper_fp8.attend`, with as many stages as fit; None: the latent is too wide."""
    blocks = num_blocks(head_dim)
    if blocks not in FP8_TILES:
        return None
    fastest = (FP8_TILES if rows > 16 else FP8_TILES_OF_FEW_ROWS)[blocks]
    for keys, warps, groups, resident in (fastest, FP8_TILES_OTHERWISE)[0 if boxes else 1 :]:
        stage = keys * (head_dim + 4 * blocks + 2 * rope_dim)
        # Queries in two parts, their rotary parts, and of each group the probabilities and the shares of blocks.
        rest = rows * (2 * head_dim + 2 * rope_dim + 2 * keys * groups) + 2 * keys * blocks * groups + 4096
        room = (card.shared_memory + RESERVED) // resident - RESERVED
        stages = min(FP8_STAGES, (room - rest) // stage)
        # Each group has stages of its own.
        stages -= stages % groups
        if stages >= 2:
            return Config(True, rows, keys, warps, stages, groups, resident, None if resident == 1 else 128)
    return None


def choose_splits(num_programs: int, num_keys: int, config: Config, multiprocessors: int) -> int:
    """Choose the number of splits of the keys with the shortest time.

    The time is the number of waves of programs, times the tiles of one split.

    Args:
        num_programs: programs of one split (batch times groups times row tiles).
        num_keys: of the longest sequence.
        config: the tiles.
        multiprocessors: of the device.
    """
    tiles = max(1, -(-num_keys // config.keys))
    slots = multiprocessors * config.resident

    def cost(splits: int) -> float:
        waves = -(-num_programs * splits // slots)
        return waves * (-(-tiles // splits) + SPLIT_OVERHEAD) + (1 if splits > 1 else 0)

    return min(range(1, min(tiles, max(1, 32 * slots // num_programs), 256) + 1), key=cost)


def choose_merge(rows: int, width: int, num_splits: int, multiprocessors: int) -> tuple[int, int]:
    """Choose the tile of `portable.merge`: splits and columns, powers of two.

    A program holds all splits of its columns, 4,096 numbers at most: 32 to a thread. More columns of fewer splits
    are longer reads. With few rows, a row is spread over several programs, so that they occupy the whole card.

    Args:
        rows: of the output.
        width: of a row.
        num_splits: to merge, 256 at most.
        multiprocessors: of the device.
    """
    splits = 1 << (num_splits - 1).bit_length()
    columns = max(16, min(1 << (width - 1).bit_length(), 4096 // splits))
    if rows * -(-width // 512) < 2 * multiprocessors:
        columns = min(columns, 128)
    return splits, columns
