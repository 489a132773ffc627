"""Decode on Hopper: the same function as `portable.attend`, with specialized warps.

Values of a latent are padded in shared memory to a multiple of 64 columns, as the tensor cores take them: the third
number of a chunk, where it has one, counts the columns that exist. The others are zeros and are not stored.

Four producer warps copy keys into a ring of shared-memory tiles; one or two groups of four consumer warps compute.
Without the specialization the same arithmetic is up to 14% slower (docs/decisions/0009). Copies are 128-byte
segments of rows, so that a thread holds few addresses, and rows beyond the end become zeros.

The weights of a row are relative to a reference, which moves only where weights of a tile exceed `limit`. So most
tiles need no maximum, nothing is rescaled, and only tiles at an edge of what a query sees are masked.
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

# Triton 3.7 renamed it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# The first reference. A score below it has no weight, like a masked one.
LOWEST = gl.constexpr(-1e30)


@gluon.constexpr_function
def limit(dtype):
    """Return how large the sum of weights that a thread holds of a row and a tile may be; then the reference moves.

    A single weight is no larger, and float16 ends at 2^16. The sums are in float32, which ends at 2^128. At most 32
    threads hold a row of 64 keys, so a million tokens add up to 2^14 * 32 * 2^24 = 2^43, and the output to that
    times the largest value: float16 ends at 2^16, and bfloat16 values may be as large as 2^84.

    The reference is never above the maximum so far, and never more than the limit below it. So the total is at
    least one, and sums are rounded relative to their size, as with weights relative to the maximum. Log2 scores of
    2^28 and above are too coarse: a weight could then overflow although the reference is the maximum.
    """
    return 2.0**12 if dtype == gl.float16 else 2.0**24


@gluon.jit
def exp2(x):
    """Return 2^x in one instruction."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def any_of(flags):
    """Return whether a flag (warps) in shared memory is set."""
    of_all: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    return gl.max(flags.load(of_all), 0)


@gluon.constexpr_function
def _shared(rows, width, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, width], dtype)


@gluon.jit
def _ring(CHUNKS: gl.constexpr, DEPTH: gl.constexpr, KEYS: gl.constexpr, dtype: gl.constexpr):
    """Allocate DEPTH tiles (KEYS, width) for each chunk of columns."""
    tiles = ()
    for i in gl.static_range(len(CHUNKS)):
        tile = gl.allocate_shared_memory(dtype, [DEPTH, KEYS, CHUNKS[i][1]], _shared(KEYS, CHUNKS[i][1], dtype))
        tiles = tiles + (tile,)
    return tiles


@gluon.jit
def _fetch(ring, slot, rows, live, CHUNKS: gl.constexpr, COPY: gl.constexpr):
    """Start the copy of one tile; rows that are not live, and columns that do not exist, are filled with zeros."""
    for i in gl.static_range(len(CHUNKS)):
        column = CHUNKS[i][0] + gl.arange(0, CHUNKS[i][1], gl.SliceLayout(0, COPY))
        exists = live[:, None]
        if len(CHUNKS[i]) == 3:
            exists = exists & (column < CHUNKS[i][0] + CHUNKS[i][2])[None, :]
        async_copy.async_copy_global_to_shared(ring[i].index(slot), rows[:, None] + column[None, :], mask=exists)


@gluon.jit
def _queries(rows, live, ROWS: gl.constexpr, CHUNKS: gl.constexpr, COPY: gl.constexpr, dtype: gl.constexpr):
    tiles = _ring(CHUNKS, 1, ROWS, dtype)
    for i in gl.static_range(len(CHUNKS)):
        column = CHUNKS[i][0] + gl.arange(0, CHUNKS[i][1], gl.SliceLayout(0, COPY))
        exists = live[:, None]
        if len(CHUNKS[i]) == 3:
            exists = exists & (column < CHUNKS[i][0] + CHUNKS[i][2])[None, :]
        q = gl.load(rows[:, None] + column[None, :], mask=exists, other=0.0)
        tiles[i].index(0).store(q)
    return tiles


@gluon.jit
def _index(tiles, index):
    """Return the tile of a number in each of several rings."""
    chosen = ()
    for i in gl.static_range(len(tiles)):
        chosen = chosen + (tiles[i].index(index),)
    return chosen


@gluon.jit
def _add_scores(score, ring, slot, queries, CHUNKS: gl.constexpr):
    for i in gl.static_range(len(CHUNKS)):
        score = warpgroup_mma(ring[i].index(slot), queries[i].permute((1, 0)), score, is_async=True)
    return score


@gluon.jit
def _sums_in_threads(weight):
    """Return the sums (warps, 8, rows) of a tile (keys, rows) over the keys that a thread holds."""
    # (keys / 64, warps, 2, 8, rows): a thread holds all of axes 0 and 2.
    of_threads = weight.reshape([weight.shape[0] // 64, gl.num_warps(), 2, 8, weight.shape[1]])
    return gl.sum(gl.sum(of_threads, 2), 0)


@gluon.jit
def _flags(sums, dtype: gl.constexpr):
    """Return (warps): 1 where a sum (warps, 8, rows) is too large."""
    # A thread holds axes 2 and 4: these in its registers first, then one instruction for the 32 lanes of a warp.
    of_lanes = sums.reshape([sums.shape[0], 8, sums.shape[2] // 8, 4, 2])
    large = gl.where(gl.max(gl.max(of_lanes, 4), 2) > limit(dtype), 1, 0)
    return gl.max(large.reshape([sums.shape[0], 32]), 1)


PRODUCER_WARPS = gl.constexpr(4)
# Registers of a producer thread, and of a consumer thread with two groups of consumers (384 threads share 64512).
PRODUCER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)


@gluon.jit
def _produce(
    source, rings, low, high,
    HEAD: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, VALUE_IS_KEY: gl.constexpr,
    KEYS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings with the keys from `low` to `high`, tile by tile, as stages become free."""
    K, KRope, V, Table, k_batch, k_token, kr_batch, kr_token, v_batch, v_token = source
    k_ring, rope_ring, v_ring, full, empty = rings
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    key = low + gl.arange(0, KEYS, gl.SliceLayout(1, copy))
    stage = 0
    phase = 1
    for start in range(low, high, KEYS):
        live = key < high
        if PAGE == 0:
            block = 0
            slot = key
        else:
            block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
            slot = key % PAGE
        mbarrier.wait(empty.index(stage), phase)
        _fetch(k_ring, stage, K + block * k_batch + slot * k_token, live, HEAD, copy)
        if len(ROPE) > 0:
            _fetch(rope_ring, stage, KRope + block * kr_batch + slot * kr_token, live, ROPE, copy)
        if not VALUE_IS_KEY:
            _fetch(v_ring, stage, V + block * v_batch + slot * v_token, live, VALUE, copy)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        key += KEYS
        phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    # All copies must be complete before the next program gets the memory.
    async_copy.wait_group(0)


@gluon.jit
def _consume(
    rows_of, mask, rings, row_start, scale, low, high,
    HEAD: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Attend from ROWS query rows to the keys in the rings, and store output and log-sum-exp."""
    Q, QRope, Out, Lse, q_token, q_head, qr_token, qr_head, out_token, out_head, lse_token = rows_of
    queries, heads_per_group, group, first, length, window = mask
    k_ring, rope_ring, v_ring, full, empty = rings
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, ROWS, 16])
    by_row: gl.constexpr = gl.SliceLayout(0, mma)
    by_key: gl.constexpr = gl.SliceLayout(1, mma)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])

    row = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, copy))
    token = row // heads_per_group
    head = group * heads_per_group + row % heads_per_group
    row_live = row < queries * heads_per_group
    q = _queries(Q + token * q_token + head * q_head, row_live, ROWS, HEAD, copy, dtype)
    if len(ROPE) > 0:
        q_rope = _queries(QRope + token * qr_token + head * qr_head, row_live, ROWS, ROPE, copy, dtype)
    p_layout: gl.constexpr = _shared(KEYS, ROWS, dtype)
    weights = gl.allocate_shared_memory(dtype, [1, KEYS, ROWS], p_layout)
    flags = gl.allocate_shared_memory(gl.int32, [warps], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    row = row_start + gl.arange(0, ROWS, by_row)
    # Between these bounds every query sees every key.
    whole_start = gl.maximum(first, length - window)
    whole_end = gl.minimum(high, length - queries + 1)
    reference = gl.full([ROWS], LOWEST, gl.float32, by_row)
    # Sums of weights over the keys of one thread.
    total = _sums_in_threads(gl.zeros([KEYS, ROWS], gl.float32, mma))
    of_sums: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, total.type.layout))
    out = ()
    for i in gl.static_range(len(VALUE)):
        out = out + (gl.zeros((gl.constexpr(VALUE[i][1]), ROWS), gl.float32, mma),)

    # All warps have stored their queries.
    fence_async_shared()
    barrier()
    stage = 0
    phase = 0
    for start in range(low, high, KEYS):
        # Zero, which the compiler does not know: else it keeps all addresses of the loop, in local memory.
        zero = start >> 31
        probability = weights.index(zero)
        mbarrier.wait(full.index(stage), phase)
        # Copies are ordinary writes, and the tensor cores read through the asynchronous proxy.
        fence_async_shared()
        score = gl.zeros([KEYS, ROWS], gl.float32, mma)
        score = _add_scores(score, k_ring, stage, _index(q, zero), HEAD)
        if len(ROPE) > 0:
            score = _add_scores(score, rope_ring, stage, _index(q_rope, zero), ROPE)
        score = warpgroup_mma_wait(0, deps=(score,))

        weight = exp2(score * scale - reference[None, :])
        if (start + KEYS > whole_end) | (start < whole_start):
            key = start + gl.arange(0, KEYS, by_key)
            last = length - queries + row // heads_per_group
            earliest = gl.maximum(first, last - window + 1)
            visible = (key[:, None] <= last[None, :]) & (key[:, None] >= earliest[None, :]) & (key < high)[:, None]
            weight = gl.where(visible, weight, 0.0)
        probability.store(weight.to(dtype))
        sums = _sums_in_threads(weight)
        flags.store(_flags(sums, dtype))
        fence_async_shared()
        barrier()
        if any_of(flags) > 0:
            # A weight of zero belongs to a key that is masked, or too far below the maximum to matter.
            raised = gl.maximum(reference, gl.max(gl.where(weight == 0, float("-inf"), score * scale), 0))
            weight = gl.where(weight == 0, 0.0, exp2(score * scale - raised[None, :]))
            probability.store(weight.to(dtype))
            sums = _sums_in_threads(weight)
            shrink = exp2(reference - raised)
            reference = raised
            total = total * gl.convert_layout(shrink, of_sums)[None, None, :]
            scaled = ()
            for i in gl.static_range(len(VALUE)):
                scaled = scaled + (out[i] * shrink[None, :],)
            out = scaled
            fence_async_shared()
            barrier()
        pending = ()
        for i in gl.static_range(len(VALUE)):
            value = v_ring[i].index(stage).permute((1, 0))
            pending = pending + (warpgroup_mma(value, probability, out[i], is_async=True),)
        total += sums
        out = ()
        for i in gl.static_range(len(VALUE)):
            out = out + (warpgroup_mma_wait(0, deps=(pending[i],)),)
        # Each thread signals that it has read the tile: a signal of one for all would need two barriers.
        async_copy.mbarrier_arrive(empty.index(stage), increment_count=False)
        phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)

    total = gl.convert_layout(gl.sum(gl.sum(total, 1), 0), by_row)
    inverse = 1.0 / gl.where(total > 0, total, 1.0)
    row_live = row < queries * heads_per_group
    token = row // heads_per_group
    head = group * heads_per_group + row % heads_per_group
    rows = Out + token * out_token + head * out_head
    for i in gl.static_range(len(VALUE)):
        column = VALUE[i][0] + gl.arange(0, VALUE[i][1], by_key)
        tile = (out[i] * inverse[None, :]).to(Out.dtype.element_ty)
        stored = row_live[None, :]
        if len(VALUE[i]) == 3:
            stored = stored & (column < VALUE[i][0] + VALUE[i][2])[:, None]
        gl.store(rows[None, :] + column[:, None], tile, mask=stored)
    gl.store(Lse + token * lse_token + head, (reference + gl.log2(total)) * 0.6931471805599453, mask=row_live)


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
    """Compute `portable.attend` with CONSUMERS (1 or 2) groups of ROWS rows that share each tile of keys.

    Every value chunk must be at least 64 wide, KEYS at least 64 and STAGES at least 2; four warps.
    """
    dtype: gl.constexpr = K.dtype.element_ty
    split = gl.program_id(0)
    row_tiles = gl.cdiv(queries * heads_per_group, ROWS * CONSUMERS)
    group = gl.program_id(1) // row_tiles
    row_start = gl.program_id(1) % row_tiles * ROWS * CONSUMERS
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

    k_ring = _ring(HEAD, STAGES, KEYS, dtype)
    rope_ring = _ring(ROPE, STAGES, KEYS, dtype)
    if VALUE_IS_KEY:
        v_ring = k_ring
    else:
        v_ring = _ring(VALUE, STAGES, KEYS, dtype)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(stage), count=32 * gl.num_warps() * CONSUMERS)
    fence_async_shared()
    barrier()

    K += group * k_group
    V += group * v_group
    if len(ROPE) == 0:
        KRope = K
        QRope = Q
    if PAGE == 0:
        K += batch * k_batch
        V += batch * v_batch
        KRope += batch * kr_batch
        Table = K
    else:
        Table += batch * table_batch
    Q += batch * q_batch
    QRope += batch * qr_batch
    Out += split.to(gl.int64) * out_split + batch * out_batch
    Lse += split.to(gl.int64) * lse_split + batch * lse_batch

    source = (K, KRope, V, Table, k_batch, k_token, kr_batch, kr_token, v_batch, v_token)
    rows_of = (Q, QRope, Out, Lse, q_token, q_head, qr_token, qr_head, out_token, out_head, lse_token)
    mask = (queries, heads_per_group, group, first, length, window)
    rings = (k_ring, rope_ring, v_ring, full, empty)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (rows_of, mask, rings, row_start, scale, low, high,
                    HEAD, ROPE, VALUE, ROWS, KEYS, STAGES, dtype)),
                (_produce, (source, rings, low, high, HEAD, ROPE, VALUE, VALUE_IS_KEY, KEYS, PAGE, STAGES)),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        second = row_start + ROWS
        gl.warp_specialize(
            [
                (_consume, (rows_of, mask, rings, row_start, scale, low, high,
                    HEAD, ROPE, VALUE, ROWS, KEYS, STAGES, dtype)),
                (_consume, (rows_of, mask, rings, second, scale, low, high,
                    HEAD, ROPE, VALUE, ROWS, KEYS, STAGES, dtype)),
                (_produce, (source, rings, low, high, HEAD, ROPE, VALUE, VALUE_IS_KEY, KEYS, PAGE, STAGES)),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
