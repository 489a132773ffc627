"""Copies of FP8 latents into shared memory on Hopper: which ones a cache allows, and the warps that start them.

The copy engine takes boxes of up to KEYS consecutive rows and 128 bytes, where the strides of a cache let it be one
matrix of rows. The first and the last tile of a program, and other caches, are copied row by row.
"""

# Gluon compiles a part of Python only: no starred tuples, no conditional expressions on None.
# ruff: noqa: RUF005, RUF059
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headwise.kernels.decode import latent_fp8
from headwise.kernels.decode.hopper import _fetch, _shared, barrier

BLOCK = gl.constexpr(latent_fp8.BLOCK)
# Keys that are copied at once where rows may be missing.
PIECE = gl.constexpr(16)


def copy_options(k: Tensor, k_rope: Tensor | None, k_scale: Tensor, page: int, keys: int) -> dict[str, Any]:
    """Return the options of `hopper_fp8.attend` that say how a cache can be copied.

    Args:
        k: (batch, capacity, 1, head_dim) or (pages, page_size, 1, head_dim), e4m3.
        k_rope: as `k`, rope_dim numbers of two bytes; None: no rotary part.
        k_scale: as `k` without groups, the scales in float32.
        page: tokens of a page; 0: no pages.
        keys: of a tile.

    Returns:
        BOX, the rows of a box (0: the strides allow none), KeyBoxes and RopeBoxes, the maps of the copy engine, and
        QUAD, whether the scales of a key can be copied as four numbers at once.
    """
    box = box_rows(k, k_rope, page, keys)
    quad = 2 <= k_scale.shape[2] <= 4 and k_scale.data_ptr() % 16 == 0
    quad = quad and all(stride % 4 == 0 and stride > 0 for stride in k_scale.stride()[:2])
    if not box:
        return dict(BOX=0, QUAD=quad, KeyBoxes=None, RopeBoxes=None)
    keys_map = _boxes(k, box, latent_fp8.BLOCK, gl.float8e4nv)
    # Two bytes are two bytes: float16 is copied in the layout of bfloat16.
    rope_map = None if k_rope is None else _boxes(k_rope, box, k_rope.shape[3], gl.bfloat16)
    return dict(BOX=box, QUAD=quad, KeyBoxes=keys_map, RopeBoxes=rope_map)


def box_rows(k: Tensor, k_rope: Tensor | None, page: int, keys: int) -> int:
    """Return the rows of a box of the copy engine; 0: the strides or widths of the cache allow none.

    Args:
        k: as of `copy_options`, and so are the others.
        k_rope: the rotary part.
        page: tokens of a page.
        keys: of a tile.
    """
    box = min(page or keys, keys)
    if keys % box or (page and page % box) or box % 8 or not _is_matrix(k):
        return 0
    if k_rope is None:
        return box
    same = _is_matrix(k_rope) and k_rope.stride(0) // k_rope.stride(1) == k.stride(0) // k.stride(1)
    return box if same and k_rope.shape[3] in (16, 32, 64) else 0


def _is_matrix(cache: Tensor) -> bool:
    """Return whether all rows of a cache stand at multiples of one stride, and begin at multiples of 16 bytes."""
    outer, pitch = cache.stride()[:2]
    matrix = pitch > 0 and outer % pitch == 0
    return matrix and pitch * cache.element_size() % 16 == 0 and cache.data_ptr() % 16 == 0


def _boxes(cache: Tensor, rows: int, width: int, kind: Any) -> Any:
    """Return the map of a cache as a matrix, in boxes of some rows and columns."""
    outer, pitch = cache.stride()[:2]
    count = (cache.shape[0] - 1) * (outer // pitch) + cache.shape[1]
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], kind)
    return TensorDescriptor(cache, [count, cache.shape[3]], [pitch, 1], [rows, width], layout)


@gluon.constexpr_function
def _width(CHUNKS):
    return sum([chunk[1] for chunk in CHUNKS])


@gluon.jit
def _block(k_rings, stage, i: gl.constexpr, BLOCKS: gl.constexpr):
    """Return the tile (keys, 128) of one block: the last of an odd number of blocks has a ring of its own."""
    EVEN: gl.constexpr = BLOCKS // 2 * 2
    if i < EVEN:
        return k_rings[0].index(stage * EVEN + i)
    else:
        return k_rings[1].index(stage)


@gluon.jit
def _columns(
    k_rings, stage, i: gl.constexpr, BLOCKS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """Return the tile (keys, WIDTH) of one or more blocks, from column i WIDTH on."""
    if WIDTH == BLOCK:
        return _block(k_rings, stage, i, BLOCKS)
    else:
        COUNT: gl.constexpr = BLOCKS * BLOCK // WIDTH
        layout: gl.constexpr = _shared(KEYS, WIDTH, gl.float8e4nv)
        tiles = k_rings[0]._reinterpret(gl.float8e4nv, [STAGES * COUNT, KEYS, WIDTH], layout)
        return tiles.index(stage * COUNT + i)


@gluon.jit
def _fetch_rows(
    source, rings, start, high, stage,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one tile, row by row; rows that are not live become zeros."""
    K, KRope, KScale, Table, k_batch, k_token, kr_batch, kr_token, ks_batch, ks_token = source
    k_rings, rope_ring, scale_ring, full, empty = rings
    WIDTH: gl.constexpr = BLOCK if BLOCKS % 2 > 0 else 2 * BLOCK
    copy: gl.constexpr = gl.BlockedLayout([1, 16], [512 // WIDTH, WIDTH // 16], [gl.num_warps(), 1], [1, 0])
    copy_rope: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    if len(ROPE) > 0:
        key = start + gl.arange(0, KEYS, gl.SliceLayout(1, copy_rope))
        live = key < high
        # These strides count eights of numbers, so that the compiler knows that rows begin at 16 bytes.
        if PAGE == 0:
            rope_rows = KRope + key * kr_token * 8
        else:
            block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
            rope_rows = KRope + block * kr_batch * 8 + key % PAGE * kr_token * 8
        _fetch(rope_ring, stage, rope_rows, live, ROPE, copy_rope)
    key = start + gl.arange(0, KEYS, gl.SliceLayout(1, copy))
    live = key < high
    if PAGE == 0:
        rows = K + key * k_token
    else:
        block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
        rows = K + block * k_batch + key % PAGE * k_token
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, copy))
    for i in gl.static_range(BLOCKS * BLOCK // WIDTH):
        async_copy.async_copy_global_to_shared(
            _columns(k_rings, stage, i, BLOCKS, KEYS, STAGES, WIDTH),
            rows[:, None] + (i * WIDTH + column)[None, :],
            mask=live[:, None],
        )


@gluon.jit
def _fetch_piece(
    source, rings, start, floor, high, stage, piece,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of PIECE keys of a tile, row by row; rows that are not live become zeros."""
    K, KRope, KScale, Table, k_batch, k_token, kr_batch, kr_token, ks_batch, ks_token = source
    k_rings, rope_ring, scale_ring, full, empty = rings
    EVEN: gl.constexpr = BLOCKS // 2 * 2
    PIECES: gl.constexpr = KEYS // PIECE
    copy: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    copy_rope: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    for i in gl.static_range(len(ROPE)):
        key = start + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, copy_rope))
        live = (key >= floor) & (key < high)
        if PAGE == 0:
            rope_rows = KRope + key * kr_token * 8
        else:
            block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
            rope_rows = KRope + block * kr_batch * 8 + key % PAGE * kr_token * 8
        column = ROPE[i][0] + gl.arange(0, ROPE[i][1], gl.SliceLayout(0, copy_rope))
        layout: gl.constexpr = _shared(PIECE, ROPE[i][1], rope_ring[i].dtype)
        tiles = rope_ring[i]._reinterpret(rope_ring[i].dtype, [STAGES * PIECES, PIECE, ROPE[i][1]], layout)
        async_copy.async_copy_global_to_shared(
            tiles.index(stage * PIECES + piece), rope_rows[:, None] + column[None, :], mask=live[:, None]
        )
    key = start + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, copy))
    live = (key >= floor) & (key < high)
    if PAGE == 0:
        rows = K + key * k_token
    else:
        block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
        rows = K + block * k_batch + key % PAGE * k_token
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, copy))
    k_layout: gl.constexpr = _shared(PIECE, BLOCK, gl.float8e4nv)
    for i in gl.static_range(BLOCKS):
        if i < EVEN:
            tiles = k_rings[0]._reinterpret(gl.float8e4nv, [STAGES * EVEN * PIECES, PIECE, BLOCK], k_layout)
            tile = tiles.index((stage * EVEN + i) * PIECES + piece)
        else:
            tiles = k_rings[1]._reinterpret(gl.float8e4nv, [STAGES * PIECES, PIECE, BLOCK], k_layout)
            tile = tiles.index(stage * PIECES + piece)
        async_copy.async_copy_global_to_shared(
            tile, rows[:, None] + (i * BLOCK + column)[None, :], mask=live[:, None]
        )


@gluon.jit
def _fetch_boxes(
    source, boxes, rings, start, stage, phase,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, BOX: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Start the copies of one tile whose rows all are live, with the copy engine."""
    Table = source[3]
    k_rings, rope_ring, scale_ring, full, empty = rings
    key_boxes, rope_boxes, batch_rows = boxes
    bar = full.index(stage)
    rows = ()
    for p in gl.static_range(KEYS // BOX):
        if PAGE == 0:
            row = (batch_rows + start + p * BOX).to(gl.int32)
        else:
            at = start + p * BOX
            row = (gl.load(Table + at // PAGE).to(gl.int32) * batch_rows + at % PAGE).to(gl.int32)
        rows = rows + (row,)
        for i in gl.static_range(len(ROPE)):
            tma.async_copy_global_to_shared(
                rope_boxes, [row, ROPE[i][0]], bar, rope_ring[i].index(stage).slice(p * BOX, BOX)
            )
    for i in gl.static_range(BLOCKS):
        if PARTS > 1 and i % 2 == 0 and i > 0:
            mbarrier.wait(empty.index(stage * PARTS + i // 2), phase)
        for p in gl.static_range(KEYS // BOX):
            tile = _block(k_rings, stage, i, BLOCKS).slice(p * BOX, BOX)
            tma.async_copy_global_to_shared(key_boxes, [rows[p], i * BLOCK], bar, tile)


@gluon.jit
def _produce(
    source, boxes, rings, floor, low, high,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    BOX: gl.constexpr, QUAD: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Fill the rings with the keys from `low` to `high`, tile by tile, as stages become free."""
    K, KRope, KScale, Table, k_batch, k_token, kr_batch, kr_token, ks_batch, ks_token = source
    k_rings, rope_ring, scale_ring, full, empty = rings
    copy_scale: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    copy_quad: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [gl.num_warps(), 1], [1, 0])
    stage = 0
    phase = 1
    for start in range(low, high, KEYS):
        mbarrier.wait(empty.index(stage * PARTS), phase)
        if BOX > 0:
            if (start + KEYS <= high) & (start >= floor):
                mbarrier.expect(full.index(stage), KEYS * (BLOCKS * BLOCK + 2 * _width(ROPE)))
                _fetch_boxes(source, boxes, rings, start, stage, phase, ROPE, BLOCKS, KEYS, PAGE, BOX, PARTS)
            else:
                for i in gl.static_range(1, PARTS):
                    mbarrier.wait(empty.index(stage * PARTS + i), phase)
                for piece in range(0, KEYS // PIECE):
                    _fetch_piece(source, rings, start, floor, high, stage, piece, ROPE, BLOCKS, KEYS, PAGE, STAGES)
                # These are ordinary writes, and the tensor cores read through the asynchronous proxy.
                async_copy.wait_group(0)
                fence_async_shared()
                barrier()
                mbarrier.arrive(full.index(stage), count=1)
        else:
            for i in gl.static_range(1, PARTS):
                mbarrier.wait(empty.index(stage * PARTS + i), phase)
            _fetch_rows(source, rings, start, high, stage, ROPE, BLOCKS, KEYS, PAGE, STAGES)
        if QUAD:
            # Strides are multiples of four, and the compiler is told so.
            key = start + gl.arange(0, KEYS, gl.SliceLayout(1, copy_quad))
            live = (key >= floor) & (key < high)
            if PAGE == 0:
                scale_rows = KScale + key * (ks_token // 4 * 4)
            else:
                block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
                scale_rows = KScale + block * (ks_batch // 4 * 4) + key % PAGE * (ks_token // 4 * 4)
            number = gl.arange(0, 4, gl.SliceLayout(0, copy_quad))
            async_copy.async_copy_global_to_shared(
                scale_ring.index(stage), scale_rows[:, None] + number[None, :], mask=live[:, None]
            )
        else:
            key = start + gl.arange(0, KEYS, copy_scale)
            live = (key >= floor) & (key < high)
            if PAGE == 0:
                scale_rows = KScale + key * ks_token
            else:
                block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
                scale_rows = KScale + block * ks_batch + key % PAGE * ks_token
            for i in gl.static_range(BLOCKS):
                async_copy.async_copy_global_to_shared(
                    scale_ring.index(stage * BLOCKS + i), scale_rows + i, mask=live
                )
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    # All copies must be complete before the next program gets the memory.
    async_copy.wait_group(0)
