"""Decode on Hopper for many query rows: the function of `portable.attend` on a latent that is its own value.

Four producer warps copy keys into a ring of shared-memory tiles. Two groups of four warps share 64 query rows: each
computes the scores of every second tile, and multiplies the weights of all tiles with its half of the columns. So
the cache is read once for 64 rows, and the tensor cores read less shared memory than with 32 rows to a group.

In a pair of tiles, the first group hands its weights and the running maximum to the second, which continues with
its own tile and hands them back. One buffer carries both, because each group takes the weights into registers at
once. At ranks up to `STAGGERED_UP_TO` the second group starts its scores when the first is done with its own: one
computes weights while the other uses the tensor cores. Pieces of columns of a tile are loaded and freed on their
own.
"""

# Gluon compiles a part of Python only: no starred tuples, no conditional expressions on None.
# ruff: noqa: B007, RUF005, SIM108
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headwise.kernels.decode.hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    PRODUCER_WARPS,
    _ring,
    _shared,
    barrier,
)

# At wider latents both groups start at once: at 512 + 64 and 128 heads that took 300 us, in place of 344.
STAGGERED_UP_TO = gl.constexpr(448)


@gluon.constexpr_function
def _mma(width, warps):
    """Return the layout of 64 rows and `width` columns in the registers of one group."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, width, 16])


@gluon.constexpr_function
def _pieces(HEAD, RIGHT):
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
def _next(stage, phase, STAGES: gl.constexpr):
    phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
    stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    return stage, phase


@gluon.jit
def _fetch(
    ring, rows, live, full, empty, stage, phase,
    PIECES: gl.constexpr, FIRST: gl.constexpr, ALL: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Start the copies of one tile, piece by piece as they become free; rows that are not live become zeros."""
    for i in gl.static_range(len(PIECES)):
        column = PIECES[i][0] + gl.arange(0, PIECES[i][1], gl.SliceLayout(0, COPY))
        n = stage * ALL + FIRST + i
        mbarrier.wait(empty.index(n), phase)
        async_copy.async_copy_global_to_shared(
            ring[i].index(stage), rows[:, None] + column[None, :], mask=live[:, None]
        )
        async_copy.mbarrier_arrive(full.index(n), increment_count=False)


@gluon.jit
def _fetch_queries(tiles, rows, live, PIECES: gl.constexpr, COPY: gl.constexpr):
    for i in gl.static_range(len(PIECES)):
        column = PIECES[i][0] + gl.arange(0, PIECES[i][1], gl.SliceLayout(0, COPY))
        async_copy.async_copy_global_to_shared(
            tiles[i].index(0), rows[:, None] + column[None, :], mask=live[:, None]
        )


@gluon.jit
def _produce(
    source, queries_of, rings, tiles, low, high, pairs,
    ROPE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries, then the keys from `low` to `high` in pairs of tiles, as pieces of the ring become free."""
    K, KRope, Table, k_batch, k_token, kr_batch, kr_token = source
    Q, QRope, q_token, q_head, qr_token, qr_head, queries, heads, row_start = queries_of
    left_ring, right_ring, rope_ring, full, empty = rings
    q_left, q_right, q_rope, q_full = tiles
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

    stage = 0
    phase = 1
    for tile in range(0, 2 * pairs):
        start = low + tile * KEYS
        key = start + gl.arange(0, KEYS, gl.SliceLayout(1, copy))
        live = key < high
        if PAGE == 0:
            block = 0
            slot = key
        else:
            block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
            slot = key % PAGE
        if len(ROPE) > 0:
            rope_rows = KRope + block * kr_batch + slot * kr_token
            _fetch(rope_ring, rope_rows, live, full, empty, stage, phase, ROPE, 0, ALL, copy)
        k_rows = K + block * k_batch + slot * k_token
        _fetch(left_ring, k_rows, live, full, empty, stage, phase, LEFT, len(ROPE), ALL, copy)
        _fetch(right_ring, k_rows, live, full, empty, stage, phase, RIGHT, AFTER_LEFT, ALL, copy)
        stage, phase = _next(stage, phase, STAGES)
    # All copies must be complete before the next program gets the memory.
    async_copy.wait_group(0)


@gluon.jit
def _await(full, stage, phase, FIRST: gl.constexpr, COUNT: gl.constexpr, ALL: gl.constexpr):
    for i in gl.static_range(COUNT):
        mbarrier.wait(full.index(stage * ALL + FIRST + i), phase)
    # Copies are ordinary writes, and the tensor cores read through the asynchronous proxy.
    fence_async_shared()


@gluon.jit
def _release(empty, stage, FIRST: gl.constexpr, COUNT: gl.constexpr, ALL: gl.constexpr):
    """Free pieces of a tile that all threads of this group have finished reading."""
    for i in gl.static_range(COUNT):
        mbarrier.arrive(empty.index(stage * ALL + FIRST + i), count=1)


@gluon.jit
def _add_scores(
    score, ring, queries, full, stage, phase,
    COUNT: gl.constexpr, FIRST: gl.constexpr, ALL: gl.constexpr, FRESH: gl.constexpr,
):  # fmt: skip
    for i in gl.static_range(COUNT):
        _await(full, stage, phase, FIRST + i, 1, ALL)
        keys = ring[i].index(stage).permute((1, 0))
        score = warpgroup_mma(queries[i].index(0), keys, score, use_acc=not (FRESH and i == 0), is_async=True)
    return score


@gluon.jit
def _start_values(out, shrink, probability, ring, stage, WIDTHS: gl.constexpr, warps: gl.constexpr):
    """Start the product of the weights of a tile with the value columns of this group."""
    pending = ()
    for i in gl.static_range(len(WIDTHS)):
        factor = gl.convert_layout(shrink, gl.SliceLayout(1, _mma(WIDTHS[i][1], warps)), assert_trivial=True)
        weight = gl.convert_layout(probability, gl.DotOperandLayout(0, _mma(WIDTHS[i][1], warps), 2))
        pending = pending + (warpgroup_mma(weight, ring[i].index(stage), out[i] * factor[:, None], is_async=True),)
    return pending


@gluon.jit
def _finish(pending, probability, empty, stage, FIRST: gl.constexpr, ALL: gl.constexpr):
    """Wait for a product, and free its pieces of the tile one by one.

    The weights are its operand in registers, so they must live until then.
    """
    out = ()
    for i in gl.static_range(len(pending)):
        done = warpgroup_mma_wait(len(pending) - 1 - i, deps=(pending[i], probability))
        out = out + (done[0],)
        # One thread signals for the group, so all threads must have finished reading.
        barrier()
        mbarrier.arrive(empty.index(stage * ALL + FIRST + i), count=1)
    return out


@gluon.jit
def _finite(maximum):
    """Return the maximum of scores, 0 for a row without a visible key: -inf - -inf would be NaN."""
    return gl.where(maximum == float("-inf"), 0.0, maximum)


@gluon.jit
def _consume(
    rows_of, mask, rings, tiles, handed, row_start, scale, low, high, pairs,
    ROPE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, STAGGERED: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Attend from ROWS query rows to the keys in the ring, and store one half of the output columns."""
    Out, Lse, out_token, out_head, lse_token = rows_of
    queries, heads, head_start, first, length, window = mask
    left_ring, right_ring, rope_ring, full, empty = rings
    q_left, q_right, q_rope, q_full = tiles
    exchange, maxima, sums, ready, turn, summed = handed
    dtype: gl.constexpr = exchange.dtype
    warps: gl.constexpr = gl.num_warps()
    AFTER_ROPE: gl.constexpr = len(ROPE)
    AFTER_LEFT: gl.constexpr = len(ROPE) + len(LEFT)
    ALL: gl.constexpr = AFTER_LEFT + len(RIGHT)
    if FIRST:
        VALUE: gl.constexpr = LEFT
        MINE: gl.constexpr = AFTER_ROPE
        value_ring = left_ring
    else:
        VALUE: gl.constexpr = RIGHT
        MINE: gl.constexpr = AFTER_LEFT
        value_ring = right_ring
    mma: gl.constexpr = _mma(KEYS, warps)
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_key: gl.constexpr = gl.SliceLayout(0, mma)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)

    row = row_start + gl.arange(0, ROWS, by_row)
    last = length - queries + row // heads
    earliest = gl.maximum(first, last - window + 1)
    # Between these bounds every query sees every key.
    whole_start = gl.maximum(first, length - window)
    whole_end = gl.minimum(high, length - queries + 1)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, by_row)
    total = gl.zeros([ROWS], gl.float32, by_row)
    out = ()
    for i in gl.static_range(len(VALUE)):
        out = out + (gl.zeros((ROWS, gl.constexpr(VALUE[i][1])), gl.float32, _mma(VALUE[i][1], warps)),)

    mbarrier.wait(q_full.index(0), 0)
    a = 0
    a_phase = 0
    # The phase of the barriers that complete once in a pair.
    step = 0
    start = low if FIRST else low + KEYS
    for pair in range(0, pairs):
        if STAGES == 2:
            a = 0
            b = 1
            a_phase = step
            b_phase = step
        else:
            b, b_phase = _next(a, a_phase, STAGES)
        mine = a if FIRST else b
        phase = a_phase if FIRST else b_phase
        if STAGGERED and not FIRST:
            mbarrier.wait(turn.index(0), step)
        score = gl.zeros([ROWS, KEYS], gl.float32, mma)
        if len(ROPE) > 0:
            score = _add_scores(score, rope_ring, q_rope, full, mine, phase, len(ROPE), 0, ALL, True)
        score = _add_scores(score, left_ring, q_left, full, mine, phase, len(LEFT), AFTER_ROPE, ALL, len(ROPE) == 0)
        score = _add_scores(score, right_ring, q_right, full, mine, phase, len(RIGHT), AFTER_LEFT, ALL, False)
        score = warpgroup_mma_wait(0, deps=(score,))
        if FIRST and STAGGERED:
            barrier()
            mbarrier.arrive(turn.index(0), count=1)

        score = score * scale
        if (start + KEYS > whole_end) | (start < whole_start):
            key = start + gl.arange(0, KEYS, by_key)
            visible = (key[None, :] <= last[:, None]) & (key[None, :] >= earliest[:, None]) & (key < high)[None, :]
            score = gl.where(visible, score, float("-inf"))
        top = gl.max(score, 1)
        if FIRST:
            middle = gl.maximum(maximum, top)
            finite = _finite(middle)
            shrink = gl.exp2(maximum - finite)
            weight = gl.exp2(score - finite[:, None])
            probability = weight.to(dtype)
            exchange.store(probability)
            maxima.index(0).store(middle)
            barrier()
            mbarrier.arrive(ready.index(0), count=1)
            _release(empty, a, 0, len(ROPE), ALL)
            probability = gl.convert_layout(probability, operand)
            pending = _start_values(out, shrink, probability, value_ring, a, VALUE, warps)
            total = total * shrink + gl.sum(weight, 1)
            mbarrier.wait(ready.index(1), step)
            other = exchange.load(operand)
            maximum = maxima.index(1).load(by_row)
            grow = gl.exp2(middle - _finite(maximum))
            total = total * grow
            out = _finish(pending, probability, empty, a, MINE, ALL)
            _await(full, b, b_phase, MINE, len(VALUE), ALL)
            pending = _start_values(out, grow, other, value_ring, b, VALUE, warps)
            out = _finish(pending, other, empty, b, MINE, ALL)
        else:
            mbarrier.wait(ready.index(0), step)
            other = exchange.load(operand)
            middle = maxima.index(0).load(by_row)
            shrink = gl.exp2(maximum - _finite(middle))
            _await(full, a, a_phase, MINE, len(VALUE), ALL)
            pending = _start_values(out, shrink, other, value_ring, a, VALUE, warps)
            maximum = gl.maximum(middle, top)
            finite = _finite(maximum)
            grow = gl.exp2(middle - finite)
            weight = gl.exp2(score - finite[:, None])
            probability = weight.to(dtype)
            barrier()
            exchange.store(probability)
            maxima.index(1).store(maximum)
            barrier()
            mbarrier.arrive(ready.index(1), count=1)
            _release(empty, b, 0, len(ROPE), ALL)
            total = total * (shrink * grow) + gl.sum(weight, 1)
            probability = gl.convert_layout(probability, operand)
            out = _finish(pending, other, empty, a, MINE, ALL)
            pending = _start_values(out, grow, probability, value_ring, b, VALUE, warps)
            out = _finish(pending, probability, empty, b, MINE, ALL)
        if STAGES > 2:
            a, a_phase = _next(b, b_phase, STAGES)
        step ^= 1
        start += 2 * KEYS

    sums.index(0 if FIRST else 1).store(total)
    barrier()
    mbarrier.arrive(summed.index(0 if FIRST else 1), count=1)
    mbarrier.wait(summed.index(1 if FIRST else 0), 0)
    total += sums.index(1 if FIRST else 0).load(by_row)
    inverse = 1.0 / gl.where(total > 0, total, 1.0)
    for i in gl.static_range(len(VALUE)):
        out_row = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, _mma(VALUE[i][1], warps)))
        column = VALUE[i][0] + gl.arange(0, VALUE[i][1], gl.SliceLayout(0, _mma(VALUE[i][1], warps)))
        factor = gl.convert_layout(inverse, gl.SliceLayout(1, _mma(VALUE[i][1], warps)), assert_trivial=True)
        rows = Out + out_row // heads * out_token + (head_start + out_row % heads) * out_head
        gl.store(
            rows[:, None] + column[None, :],
            (out[i] * factor[:, None]).to(Out.dtype.element_ty),
            mask=(out_row < queries * heads)[:, None],
        )
    if FIRST:
        gl.store(
            Lse + row // heads * lse_token + head_start + row % heads,
            (maximum + gl.log2(total)) * 0.6931471805599453,
            mask=row < queries * heads,
        )


@gluon.jit(do_not_specialize=["queries", "heads_per_group", "capacity", "window", "lse_split", "lse_batch"])
def attend(
    Q, QRope, K, KRope, V, KScale, Lengths, Starts, Table, Out, Lse, scale,
    q_batch, q_token, q_head, qr_batch, qr_token, qr_head,
    k_batch, k_token, k_group, kr_batch, kr_token, v_batch, v_token, v_group,
    ks_batch, ks_token, table_batch,
    out_split, out_batch, out_token, out_head, lse_split, lse_batch, lse_token,
    queries, heads_per_group, capacity, window,
    HEAD: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, VALUE_IS_KEY: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Compute `portable.attend` where the value is the key; ROWS is 64, KEYS is 128, and two groups share the rows.

    The rank is a multiple of 64, at least 128, and STAGES is at least 2; four warps.
    """
    dtype: gl.constexpr = K.dtype.element_ty
    TILE: gl.constexpr = KEYS // 2
    LEFT: gl.constexpr = _pieces(HEAD, False)
    RIGHT: gl.constexpr = _pieces(HEAD, True)
    ALL: gl.constexpr = len(ROPE) + len(LEFT) + len(RIGHT)
    STAGGERED: gl.constexpr = HEAD[-1][0] + HEAD[-1][1] <= STAGGERED_UP_TO
    split = gl.program_id(0)
    row_tiles = gl.cdiv(queries * heads_per_group, ROWS)
    group = gl.program_id(1) // row_tiles
    row_start = gl.program_id(1) % row_tiles * ROWS
    batch = gl.program_id(2).to(gl.int64)

    if Lengths is None:
        length = capacity
    else:
        length = gl.load(Lengths + batch)
    if Starts is None:
        first = 0
    else:
        first = gl.load(Starts + batch)
    low = gl.maximum(first, length - queries - window + 1)
    span = gl.cdiv(gl.cdiv(gl.maximum(length - low, 0), gl.num_programs(0)), KEYS) * KEYS
    low += split * span
    high = gl.minimum(low + span, length)
    pairs = gl.cdiv(gl.maximum(high - low, 0), KEYS)

    left_ring = _ring(LEFT, STAGES, TILE, dtype)
    right_ring = _ring(RIGHT, STAGES, TILE, dtype)
    rope_ring = _ring(ROPE, STAGES, TILE, dtype)
    q_left = _ring(LEFT, 1, ROWS, dtype)
    q_right = _ring(RIGHT, 1, ROWS, dtype)
    q_rope = _ring(ROPE, 1, ROWS, dtype)
    exchange = gl.allocate_shared_memory(dtype, [ROWS, TILE], _shared(ROWS, TILE, dtype))
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    maxima = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    sums = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    full = gl.allocate_shared_memory(gl.int64, [STAGES * ALL, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES * ALL, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES * ALL):
        mbarrier.init(full.index(i), count=32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(q_full.index(0), count=32 * PRODUCER_WARPS)
    mbarrier.init(turn.index(0), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(summed.index(i), count=1)
    fence_async_shared()
    barrier()

    K += group * k_group
    if len(ROPE) == 0:
        KRope = K
        QRope = Q
    if PAGE == 0:
        K += batch * k_batch
        KRope += batch * kr_batch
        Table = K
    else:
        Table += batch * table_batch
    head_start = group * heads_per_group
    Q += batch * q_batch + head_start * q_head
    QRope += batch * qr_batch + head_start * qr_head
    Out += split.to(gl.int64) * out_split + batch * out_batch
    Lse += split.to(gl.int64) * lse_split + batch * lse_batch

    source = (K, KRope, Table, k_batch, k_token, kr_batch, kr_token)
    queries_of = (Q, QRope, q_token, q_head, qr_token, qr_head, queries, heads_per_group, row_start)
    rows_of = (Out, Lse, out_token, out_head, lse_token)
    mask = (queries, heads_per_group, head_start, first, length, window)
    rings = (left_ring, right_ring, rope_ring, full, empty)
    tiles = (q_left, q_right, q_rope, q_full)
    handed = (exchange, maxima, sums, ready, turn, summed)
    gl.warp_specialize(
        [
            (_consume, (rows_of, mask, rings, tiles, handed, row_start, scale, low, high, pairs,
                ROPE, LEFT, RIGHT, ROWS, TILE, STAGES, STAGGERED, True)),
            (_consume, (rows_of, mask, rings, tiles, handed, row_start, scale, low, high, pairs,
                ROPE, LEFT, RIGHT, ROWS, TILE, STAGES, STAGGERED, False)),
            (_produce, (source, queries_of, rings, tiles, low, high, pairs,
                ROPE, LEFT, RIGHT, ROWS, TILE, PAGE, STAGES)),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
