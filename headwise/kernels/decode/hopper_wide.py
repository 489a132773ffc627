"""Decode on Hopper for many query rows: the function of `portable.attend` on a latent that is its own value.

Four producer warps copy keys into a ring of shared-memory tiles (`wide_ring`). Two groups of four warps share 64
query rows: in a pair of tiles, each group computes the weights of one tile, hands them to the other, and multiplies
the weights of both tiles with its half of the value columns. So the cache is read once for 64 rows, and the tensor
cores read less shared memory than with 32 rows to a group.

The weights of a row are relative to a reference, which moves only where weights of a tile exceed `limit`. So in
most pairs there is no maximum, and nothing is rescaled. A group whose weights are too large raises its reference.
The other group reads that from a flag beside the weights, and takes the larger of both references.

With a ring of two or three tiles the first group hands its weights over early: the second multiplies them before it
computes its own. With more tiles, each group multiplies its own weights first.
"""

# Gluon compiles a part of Python only: no starred tuples, no conditional expressions on None.
# ruff: noqa: B007, RUF005, SIM108
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headwise.kernels.decode.hopper import (
    CONSUMER_REGISTERS,
    LOWEST,
    PRODUCER_REGISTERS,
    PRODUCER_WARPS,
    _ring,
    _shared,
    any_of,
    barrier,
    exp2,
    limit,
)
from headwise.kernels.decode.wide_ring import next_stage, pieces_of, produce, release, wait_for


@gluon.constexpr_function
def _mma(width, warps):
    """Return the layout of 64 rows and `width` columns in the registers of one group."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, width, 16])


@gluon.jit
def _add_scores(score, ring, queries, stage, zero, COUNT: gl.constexpr, FRESH: gl.constexpr):
    """Start the products of the queries with pieces of a tile."""
    for i in gl.static_range(COUNT):
        keys = ring[i].index(stage).permute((1, 0))
        score = warpgroup_mma(queries[i].index(zero), keys, score, use_acc=not (FRESH and i == 0), is_async=True)
    return score


@gluon.jit
def _add_values(out, probability, ring, stage, COUNT: gl.constexpr):
    """Start the product of the weights of a tile with the value columns of this group."""
    pending = ()
    for i in gl.static_range(COUNT):
        pending = pending + (warpgroup_mma(probability, ring[i].index(stage), out[i], is_async=True),)
    return pending


@gluon.jit
def _add_own_values(out, probability, ring, stage, WIDTHS: gl.constexpr, warps: gl.constexpr):
    """Start the product of weights in registers with the value columns of this group."""
    pending = ()
    for i in gl.static_range(len(WIDTHS)):
        weight = gl.convert_layout(probability, gl.DotOperandLayout(0, _mma(WIDTHS[i][1], warps), 2))
        pending = pending + (warpgroup_mma(weight, ring[i].index(stage), out[i], is_async=True),)
    return pending


@gluon.jit
def _finish(pending, kept):
    """Wait for all products, and return those that are pending; `kept` (operands in registers) lives until then."""
    if len(pending) + len(kept) == 1:
        done = (warpgroup_mma_wait(0, deps=pending),)
    else:
        done = warpgroup_mma_wait(0, deps=pending + kept)
    out = ()
    for i in gl.static_range(len(pending)):
        out = out + (done[i],)
    return out


@gluon.jit
def _sum_in_thread(weight):
    """Return the sums (rows, 4) of a tile (rows, keys) over the keys that a thread holds."""
    # (rows, keys / 8, 4, 2): a thread holds all of axes 1 and 3.
    of_threads = weight.reshape([weight.shape[0], weight.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(of_threads, 3), 1)


@gluon.jit
def _rescale(out, factor, WIDTHS: gl.constexpr, warps: gl.constexpr):
    scaled = ()
    for i in gl.static_range(len(WIDTHS)):
        of_rows = gl.convert_layout(factor, gl.SliceLayout(1, _mma(WIDTHS[i][1], warps)), assert_trivial=True)
        scaled = scaled + (out[i] * of_rows[:, None],)
    return scaled


@gluon.jit
def _flag(part, LIMIT: gl.constexpr):
    """Return (warps): 1 where a sum (rows, 4) of a thread is too large, which it is if one of its weights is."""
    large = gl.where(part > LIMIT, 1, 0).reshape([gl.num_warps(), 2, 8, 4])
    # In the registers of a thread first, then one instruction for the 32 lanes of a warp.
    return gl.max(gl.max(large, 1).reshape([gl.num_warps(), 32]), 1)


@gluon.jit
def _consume(
    rows_of, mask, rings, tiles, handed, row_start, scale, low, high, pairs,
    ROPE: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Attend from ROWS query rows to the keys in the ring, and store one half of the output columns."""
    Out, Lse, out_token, out_head, lse_token = rows_of
    queries, heads, head_start, first, length, window = mask
    left_ring, right_ring, rope_ring, full, empty = rings
    q_left, q_right, q_rope, q_full = tiles
    exchange, flags, references, sums, ready, summed = handed
    dtype: gl.constexpr = exchange.dtype
    warps: gl.constexpr = gl.num_warps()
    LIMIT: gl.constexpr = limit(dtype)
    AFTER_ROPE: gl.constexpr = len(ROPE)
    AFTER_LEFT: gl.constexpr = len(ROPE) + len(LEFT)
    ALL: gl.constexpr = AFTER_LEFT + len(RIGHT)
    if ME == 0:
        VALUE: gl.constexpr = LEFT
        MINE: gl.constexpr = AFTER_ROPE
        YOURS: gl.constexpr = AFTER_LEFT
        REST: gl.constexpr = len(RIGHT)
        value_ring = left_ring
        rest_ring = right_ring
        q_value = q_left
        q_rest = q_right
    else:
        VALUE: gl.constexpr = RIGHT
        MINE: gl.constexpr = AFTER_LEFT
        YOURS: gl.constexpr = AFTER_ROPE
        REST: gl.constexpr = len(LEFT)
        value_ring = right_ring
        rest_ring = left_ring
        q_value = q_right
        q_rest = q_left
    COUNT: gl.constexpr = len(VALUE)
    SECOND: gl.constexpr = EARLY and ME == 1
    mma: gl.constexpr = _mma(KEYS, warps)
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_key: gl.constexpr = gl.SliceLayout(0, mma)

    row = row_start + gl.arange(0, ROWS, by_row)
    # Between these bounds every query sees every key.
    whole_start = gl.maximum(first, length - window)
    whole_end = gl.minimum(high, length - queries + 1)
    reference = gl.full([ROWS], LOWEST, gl.float32, by_row)
    # Sums of weights over the keys of one thread.
    total = _sum_in_thread(gl.zeros([ROWS, KEYS], gl.float32, mma))
    of_part: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    out = ()
    for i in gl.static_range(COUNT):
        out = out + (gl.zeros((ROWS, gl.constexpr(VALUE[i][1])), gl.float32, _mma(VALUE[i][1], warps)),)

    mbarrier.wait(q_full.index(0), 0)
    a = 0
    a_phase = 0
    # The phase of the barriers that complete once in a pair.
    step = 0
    start = low + ME * KEYS
    for pair in range(0, pairs):
        # Zero, which the compiler does not know: else it keeps all addresses of the loop, in local memory.
        zero = start >> 31
        if STAGES == 2:
            a = zero
            b = zero + 1
            a_phase = step
            b_phase = step
        else:
            b, b_phase = next_stage(a, a_phase, STAGES)
        mine = a if ME == 0 else b
        phase = a_phase if ME == 0 else b_phase
        yours = b if ME == 0 else a
        your_phase = b_phase if ME == 0 else a_phase
        # Copies are ordinary writes, and the tensor cores read through the asynchronous proxy.
        wait_for(full, mine, phase, MINE, COUNT, ALL)
        fence_async_shared()
        score = gl.zeros([ROWS, KEYS], gl.float32, mma)
        score = _add_scores(score, value_ring, q_value, mine, zero, COUNT, True)
        wait_for(full, mine, phase, YOURS, REST, ALL)
        wait_for(full, mine, phase, 0, len(ROPE), ALL)
        fence_async_shared()
        score = _add_scores(score, rest_ring, q_rest, mine, zero, REST, False)
        score = _add_scores(score, rope_ring, q_rope, mine, zero, len(ROPE), False)
        score = warpgroup_mma_wait(0, deps=(score,))

        if SECOND:
            # The weights of the first tile are there early: their product runs while this group computes its own.
            mbarrier.wait(ready.index(yours), your_phase)
            if any_of(flags.index(yours)) > 0:
                raised = references.index(yours).load(by_row)
                shrink = exp2(reference - raised)
                reference = raised
                total = total * gl.convert_layout(shrink, of_part)[:, None]
                out = _rescale(out, shrink, VALUE, warps)
            pending = _add_values(out, exchange.index(yours), value_ring, yours, COUNT)
        if (start + KEYS > whole_end) | (start < whole_start):
            key = start + gl.arange(0, KEYS, by_key)
            last = length - queries + row // heads
            earliest = gl.maximum(first, last - window + 1)
            visible = (key[None, :] <= last[:, None]) & (key[None, :] >= earliest[:, None]) & (key < high)[None, :]
            score = gl.where(visible, score, float("-inf"))
        weight = exp2(score * scale - reference[:, None])
        exchange.index(mine).store(weight.to(dtype))
        part = _sum_in_thread(weight)
        flags.index(mine).store(_flag(part, LIMIT))
        references.index(mine).store(reference)
        fence_async_shared()
        barrier()
        raise_mine = any_of(flags.index(mine))
        if SECOND:
            # The first group waits for weights that are final.
            mbarrier.arrive(ready.index(mine), count=1, pred=raise_mine == 0)
            out = _finish(pending, ())
            barrier()
            release(empty, yours, MINE, COUNT, ALL)
            release(empty, yours, 0, len(ROPE), ALL)
        if raise_mine > 0:
            raised = gl.maximum(reference, gl.max(score * scale, 1))
            shrink = exp2(reference - raised)
            reference = raised
            weight = exp2(score * scale - reference[:, None])
            exchange.index(mine).store(weight.to(dtype))
            references.index(mine).store(reference)
            part = _sum_in_thread(weight)
            total = total * gl.convert_layout(shrink, of_part)[:, None]
            out = _rescale(out, shrink, VALUE, warps)
            fence_async_shared()
            barrier()
        if SECOND:
            mbarrier.arrive(ready.index(mine), count=1, pred=raise_mine > 0)
        else:
            mbarrier.arrive(ready.index(mine), count=1)
        # The weights of the own tile, from registers.
        probability = weight.to(dtype)
        pending = _add_own_values(out, probability, value_ring, mine, VALUE, warps)
        total += part
        if SECOND:
            out = _finish(pending, (probability,))
            barrier()
            release(empty, mine, MINE, COUNT, ALL)
        else:
            # The other group has waited for its tile.
            mbarrier.wait(ready.index(yours), your_phase)
            raise_any = raise_mine + any_of(flags.index(yours))
            out = _finish(pending, (probability,))
            barrier()
            release(empty, mine, MINE, COUNT, ALL)
            if raise_any > 0:
                theirs = references.index(yours).load(by_row)
                raised = gl.maximum(reference, theirs)
                shrink = exp2(reference - raised)
                reference = raised
                other = exchange.index(yours).load(mma).to(gl.float32) * exp2(theirs - raised)[:, None]
                exchange.index(yours).store(other.to(dtype))
                total = total * gl.convert_layout(shrink, of_part)[:, None]
                out = _rescale(out, shrink, VALUE, warps)
                fence_async_shared()
                barrier()
            pending = _add_values(out, exchange.index(yours), value_ring, yours, COUNT)
            out = _finish(pending, ())
            barrier()
            release(empty, yours, MINE, COUNT, ALL)
            release(empty, yours, 0, len(ROPE), ALL)
        if STAGES > 2:
            a, a_phase = next_stage(b, b_phase, STAGES)
        step ^= 1
        start += 2 * KEYS

    total = gl.convert_layout(gl.sum(total, 1), by_row)
    sums.index(ME).store(total)
    barrier()
    mbarrier.arrive(summed.index(ME), count=1)
    mbarrier.wait(summed.index(1 - ME), 0)
    total += sums.index(1 - ME).load(by_row)
    inverse = 1.0 / gl.where(total > 0, total, 1.0)
    for i in gl.static_range(COUNT):
        out_row = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, _mma(VALUE[i][1], warps)))
        column = VALUE[i][0] + gl.arange(0, VALUE[i][1], gl.SliceLayout(0, _mma(VALUE[i][1], warps)))
        factor = gl.convert_layout(inverse, gl.SliceLayout(1, _mma(VALUE[i][1], warps)), assert_trivial=True)
        rows = Out + out_row // heads * out_token + (head_start + out_row % heads) * out_head
        stored = (out_row < queries * heads)[:, None]
        gl.store(rows[:, None] + column[None, :], (out[i] * factor[:, None]).to(Out.dtype.element_ty), mask=stored)
    if ME == 0:
        gl.store(
            Lse + row // heads * lse_token + head_start + row % heads,
            (reference + gl.log2(total)) * 0.6931471805599453,
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

    The rank is a multiple of 64 above 64, and STAGES is at least 2. `scale` is above 0: masked scores are -inf
    before they are scaled, so a negative scale makes them +inf, and 0 makes them NaN. Four warps.
    """
    dtype: gl.constexpr = K.dtype.element_ty
    TILE: gl.constexpr = KEYS // 2
    EARLY: gl.constexpr = STAGES <= 3
    LEFT: gl.constexpr = pieces_of(HEAD, False)
    RIGHT: gl.constexpr = pieces_of(HEAD, True)
    ALL: gl.constexpr = len(ROPE) + len(LEFT) + len(RIGHT)
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
    # The weights (rows, keys) of a tile take the place of its rotary keys (keys, columns) where these are as large:
    # only the group that wrote the weights has read them.
    if len(ROPE) == 1 and ROPE[0][1] == TILE:
        exchange = rope_ring[0]
    else:
        exchange = gl.allocate_shared_memory(dtype, [STAGES, ROWS, TILE], _shared(ROWS, TILE, dtype))
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flags = gl.allocate_shared_memory(gl.int32, [STAGES, 4], vector)
    references = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], vector)
    sums = gl.allocate_shared_memory(gl.float32, [2, ROWS], vector)
    full = gl.allocate_shared_memory(gl.int64, [STAGES * ALL, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES * ALL, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES * ALL):
        mbarrier.init(full.index(i), count=32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(q_full.index(0), count=32 * PRODUCER_WARPS)
    for i in gl.static_range(2):
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
    handed = (exchange, flags, references, sums, ready, summed)
    gl.warp_specialize(
        [
            (_consume, (rows_of, mask, rings, tiles, handed, row_start, scale, low, high, pairs,
                ROPE, LEFT, RIGHT, ROWS, TILE, STAGES, EARLY, 0)),
            (_consume, (rows_of, mask, rings, tiles, handed, row_start, scale, low, high, pairs,
                ROPE, LEFT, RIGHT, ROWS, TILE, STAGES, EARLY, 1)),
            (produce, (source, queries_of, rings, tiles, low, high, pairs,
                ROPE, LEFT, RIGHT, ROWS, TILE, PAGE, STAGES, EARLY)),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
