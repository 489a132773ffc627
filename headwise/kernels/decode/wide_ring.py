"""The ring of `hopper_wide`: tiles of keys whose pieces of columns are loaded and freed on their own."""

# Gluon compiles a part of Python only.
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier


@gluon.constexpr_function
def pieces_of(HEAD, RIGHT):
    """Return (start, power of two) pieces of the left or the right half of the columns."""
    width = HEAD[-1][0] + HEAD[-1][1]
    middle = (width + 127) // 128 * 64
    start = middle if RIGHT else 0
    end = width if RIGHT else middle
    pieces = []
    while start < end:
        piece = 1 << ((end - start).bit_length() - 1)
        pieces.append((start, piece))
        start += piece
    return tuple(pieces)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Return the stage after this one, and the phase of its barriers."""
    phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
    stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    return stage, phase


@gluon.jit
def wait_for(full, stage, phase, FIRST: gl.constexpr, COUNT: gl.constexpr, ALL: gl.constexpr):
    """Wait for pieces of a tile."""
    for i in gl.static_range(COUNT):
        mbarrier.wait(full.index(stage * ALL + FIRST + i), phase)


@gluon.jit
def release(empty, stage, FIRST: gl.constexpr, COUNT: gl.constexpr, ALL: gl.constexpr):
    """Free pieces of a tile that all threads of this group have finished reading."""
    for i in gl.static_range(COUNT):
        mbarrier.arrive(empty.index(stage * ALL + FIRST + i), count=1)


@gluon.jit
def _copy(tile, rows, live, START: gl.constexpr, COPY: gl.constexpr):
    """Start the copy of a piece; rows that are not live become zeros."""
    column = START + gl.arange(0, tile.shape[1], gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(tile, rows[:, None] + column[None, :], mask=live[:, None])


@gluon.jit
def _fetch(
    ring, rows, live, full, empty, stage, phase,
    PIECES: gl.constexpr, FIRST: gl.constexpr, ALL: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Start the copies of one tile, piece by piece as they become free."""
    for i in gl.static_range(len(PIECES)):
        n = stage * ALL + FIRST + i
        mbarrier.wait(empty.index(n), phase)
        _copy(ring[i].index(stage), rows, live, PIECES[i][0], COPY)
        async_copy.mbarrier_arrive(full.index(n), increment_count=False)


@gluon.jit
def _fetch_queries(tiles, rows, live, PIECES: gl.constexpr, COPY: gl.constexpr):
    for i in gl.static_range(len(PIECES)):
        _copy(tiles[i].index(0), rows, live, PIECES[i][0], COPY)


@gluon.jit
def _locate(source, start, high, KEYS: gl.constexpr, PAGE: gl.constexpr, COPY: gl.constexpr):
    """Return where the keys of a tile and their rotary parts stand, and which of them exist."""
    K, KRope, Table, k_batch, k_token, kr_batch, kr_token = source
    key = start + gl.arange(0, KEYS, gl.SliceLayout(1, COPY))
    live = key < high
    if PAGE == 0:
        block = 0
        slot = key
    else:
        block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
        slot = key % PAGE
    return K + block * k_batch + slot * k_token, KRope + block * kr_batch + slot * kr_token, live


@gluon.jit
def produce(
    source, queries_of, rings, tiles, low, high, pairs,
    ROPE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    PAGE: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Copy the queries, then the keys from `low` to `high` in pairs of tiles, as pieces of the ring become free."""
    Q, QRope, q_token, q_head, qr_token, qr_head, queries, heads, row_start = queries_of
    left_ring, right_ring, rope_ring, full, empty = rings
    q_left, q_right, q_rope, q_full = tiles
    AFTER_ROPE: gl.constexpr = len(ROPE)
    AFTER_LEFT: gl.constexpr = len(ROPE) + len(LEFT)
    ALL: gl.constexpr = AFTER_LEFT + len(RIGHT)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])

    row = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, copy))
    row_live = row < queries * heads
    rows = Q + row // heads * q_token + row % heads * q_head
    if len(ROPE) > 0:
        _fetch_queries(q_rope, QRope + row // heads * qr_token + row % heads * qr_head, row_live, ROPE, copy)
    _fetch_queries(q_left, rows, row_live, LEFT, copy)
    _fetch_queries(q_right, rows, row_live, RIGHT, copy)
    async_copy.mbarrier_arrive(q_full.index(0), increment_count=False)

    a = 0
    a_phase = 1
    for pair in range(0, pairs):
        start = low + pair * 2 * KEYS
        b, b_phase = next_stage(a, a_phase, STAGES)
        a_rows, a_rope, a_live = _locate(source, start, high, KEYS, PAGE, copy)
        b_rows, b_rope, b_live = _locate(source, start + KEYS, high, KEYS, PAGE, copy)
        # First the pieces that each group multiplies first.
        _fetch(left_ring, a_rows, a_live, full, empty, a, a_phase, LEFT, AFTER_ROPE, ALL, copy)
        if not EARLY:
            _fetch(right_ring, b_rows, b_live, full, empty, b, b_phase, RIGHT, AFTER_LEFT, ALL, copy)
        _fetch(right_ring, a_rows, a_live, full, empty, a, a_phase, RIGHT, AFTER_LEFT, ALL, copy)
        _fetch(rope_ring, a_rope, a_live, full, empty, a, a_phase, ROPE, 0, ALL, copy)
        if EARLY:
            _fetch(right_ring, b_rows, b_live, full, empty, b, b_phase, RIGHT, AFTER_LEFT, ALL, copy)
        _fetch(left_ring, b_rows, b_live, full, empty, b, b_phase, LEFT, AFTER_ROPE, ALL, copy)
        _fetch(rope_ring, b_rope, b_live, full, empty, b, b_phase, ROPE, 0, ALL, copy)
        a, a_phase = next_stage(b, b_phase, STAGES)
    # All copies must be complete before the next program gets the memory.
    async_copy.wait_group(0)
