"""Decode on latents in FP8 on Hopper: the function of `portable.attend` with scales, with specialized warps.

Four producer warps copy keys into a ring of shared-memory tiles. Two groups of four consumer warps take every
second tile, and the first merges the results of both. Arithmetic must hide behind half the bytes, so no tile is
expanded in shared memory:

- Scores are products in FP8. The query is the sum of two e4m3 numbers, scaled by its largest element, which holds
  it as exactly as bfloat16 does. The scale of a block multiplies the partial scores.
- Values are read as pairs of numbers with the transposing load of 16-bit elements, and expanded to float16 in
  registers. Even and odd columns have accumulators of their own. The scale is a float16 there, LIFT times as large.
  Latents overflow above 4,094. A block whose largest number is below 3e-4 loses digits: 1% at 3e-5.
"""

# Gluon compiles a part of Python only: no starred tuples, no conditional expressions on None.
# ruff: noqa: B007, F821, RUF005, SIM108
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

from headwise.kernels.decode import latent_fp8
from headwise.kernels.decode.hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    PRODUCER_WARPS,
    _add_scores,
    _fetch,
    _ring,
    _shared,
    barrier,
)

BLOCK = gl.constexpr(latent_fp8.BLOCK)
LARGEST = gl.constexpr(latent_fp8.LARGEST)
PAIRS = gl.constexpr(latent_fp8.BLOCK // 2)
# A rotary part of a query that is larger than this many times the rest decides the unit: 448 times it is a float16.
ROTARY = gl.constexpr(128.0)
# Values are so many times larger in float16 than in the cache, so that small scales keep their digits.
LIFT = gl.constexpr(16.0)


@gluon.jit
def _expand(pairs):
    """Return the low and the high e4m3 number of each 16-bit element as float16."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """,
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _load_queries(rows, live, column, copy: gl.constexpr):
    return gl.load(rows[:, None] + column[None, :], mask=live[:, None], other=0.0).to(gl.float32)


@gluon.jit
def _split_queries(
    Q, QRope, q_token, q_head, qr_token, qr_head, row_start, number_of_queries, heads, queries,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Store each query as the sum of two e4m3 numbers, its rotary part, and the unit of both in float32."""
    high, low, q_rope, units = queries
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = row_start + gl.arange(0, ROWS, gl.SliceLayout(1, copy))
    live = row < number_of_queries * heads
    rows = Q + row // heads * q_token + row % heads * q_head
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, copy))
    largest = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, copy))
    for i in gl.static_range(BLOCKS):
        q = _load_queries(rows, live, i * BLOCK + column, copy)
        largest = gl.maximum(largest, gl.max(gl.abs(q), 1))
    # A large rotary part decides the unit: else float16 would overflow when it is divided by the unit.
    rope_rows = QRope + row // heads * qr_token + row % heads * qr_head
    for i in gl.static_range(len(ROPE)):
        rope_column = ROPE[i][0] + gl.arange(0, ROPE[i][1], gl.SliceLayout(0, copy))
        q = _load_queries(rope_rows, live, rope_column, copy)
        largest = gl.maximum(largest, gl.max(gl.abs(q), 1) / ROTARY)
    unit = gl.where(largest > 0, largest, 1.0) / LARGEST
    units.store(unit)
    for i in gl.static_range(BLOCKS):
        q = _load_queries(rows, live, i * BLOCK + column, copy) / unit[:, None]
        first = q.to(gl.float8e4nv)
        high.index(i).store(first)
        low.index(i).store((q - first.to(gl.float32)).to(gl.float8e4nv))
    for i in gl.static_range(len(ROPE)):
        rope_column = ROPE[i][0] + gl.arange(0, ROPE[i][1], gl.SliceLayout(0, copy))
        q = _load_queries(rope_rows, live, rope_column, copy) / unit[:, None]
        q_rope[i].index(0).store(q.to(q_rope[i].dtype))


@gluon.jit
def _produce(
    source, rings, low, high,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings with the keys from `low` to `high`, tile by tile, as stages become free."""
    K, KRope, KScale, Table, k_batch, k_token, kr_batch, kr_token, ks_batch, ks_token = source
    k_ring, rope_ring, scale_ring, full, empty = rings
    copy: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    copy_rope: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    copy_scale: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = 0
    phase = 1
    for start in range(low, high, KEYS):
        mbarrier.wait(empty.index(stage), phase)
        key = start + gl.arange(0, KEYS, gl.SliceLayout(1, copy))
        live = key < high
        if PAGE == 0:
            rows = K + key * k_token
        else:
            block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
            rows = K + block * k_batch + key % PAGE * k_token
        column = gl.arange(0, BLOCK, gl.SliceLayout(0, copy))
        for i in gl.static_range(BLOCKS):
            async_copy.async_copy_global_to_shared(
                k_ring.index(stage * BLOCKS + i), rows[:, None] + (i * BLOCK + column)[None, :], mask=live[:, None]
            )
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
        key = start + gl.arange(0, KEYS, copy_scale)
        live = key < high
        if PAGE == 0:
            scale_rows = KScale + key * ks_token
        else:
            block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
            scale_rows = KScale + block * ks_batch + key % PAGE * ks_token
        for i in gl.static_range(BLOCKS):
            async_copy.async_copy_global_to_shared(scale_ring.index(stage * BLOCKS + i), scale_rows + i, mask=live)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    # All copies must be complete before the next program gets the memory.
    async_copy.wait_group(0)


@gluon.jit
def _sum_in_thread(weight):
    """Return the sums of a score tile (64, rows) over the pairs of keys that a thread holds: (4, 8, rows)."""
    return gl.sum(weight.reshape([4, 2, 8, weight.shape[1]]), 1)


@gluon.jit
def _start_scores(k_ring, n, queries, i: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr, mma: gl.constexpr):
    high, low, _, _ = queries
    keys = k_ring.index(n)
    score = gl.zeros([KEYS, ROWS], gl.float32, mma)
    score = warpgroup_mma(keys, high.index(i).permute((1, 0)), score, is_async=True)
    return warpgroup_mma(keys, low.index(i).permute((1, 0)), score, is_async=True)


@gluon.jit
def _consume(
    rows_of, mask, rings, queries, handed, row_start, scale, low, high,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    """Attend from ROWS query rows to every second tile in the rings; the first group merges and stores."""
    Out, Lse, out_token, out_head, lse_token = rows_of
    number_of_queries, heads, first, length, window = mask
    k_ring, rope_ring, scale_ring, full, empty = rings
    partial, partial_max, partial_sum, free, ready = handed
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, ROWS, 16])
    mma_fp8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, ROWS, 32])
    by_row: gl.constexpr = gl.SliceLayout(0, mma)
    by_key: gl.constexpr = gl.SliceLayout(1, mma)
    HALF: gl.constexpr = KEYS // 2
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    pair_ring = k_ring._reinterpret(gl.int16, [STAGES * BLOCKS, KEYS, PAIRS], _shared(KEYS, PAIRS, gl.int16))
    p_layout: gl.constexpr = _shared(KEYS, ROWS, gl.float16)
    probability = gl.allocate_shared_memory(gl.float16, [KEYS, ROWS], p_layout)

    q_rope = ()
    for i in gl.static_range(len(ROPE)):
        q_rope = q_rope + (queries[2][i].index(0),)
    unit = queries[3].load(by_row) * scale
    maximum = gl.full([ROWS], float("-inf"), gl.float32, by_row)
    # Sums of weights over the keys of one thread.
    weights = _sum_in_thread(gl.zeros([KEYS, ROWS], gl.float32, mma))
    thread_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, weights.type.layout))
    out = ()
    for i in gl.static_range(2 * BLOCKS):
        out = out + (gl.zeros((PAIRS, ROWS), gl.float32, mma),)

    # Between these bounds every query sees every key.
    whole_start = gl.maximum(first, length - window)
    whole_end = gl.minimum(high, length - number_of_queries + 1)
    stage = 0 if FIRST else 1
    phase = 0
    for start in range(low if FIRST else low + KEYS, high, 2 * KEYS):
        mbarrier.wait(full.index(stage), phase)
        # Copies are ordinary writes, and the tensor cores read through the asynchronous proxy.
        fence_async_shared()
        score = gl.zeros([KEYS, ROWS], gl.float32, mma)
        if len(ROPE) > 0:
            score = _add_scores(score, rope_ring, stage, q_rope, ROPE)
        pending = _start_scores(k_ring, stage * BLOCKS, queries, 0, KEYS, ROWS, mma_fp8)
        for i in gl.static_range(BLOCKS):
            if i < BLOCKS - 1:
                following = _start_scores(k_ring, stage * BLOCKS + i + 1, queries, i + 1, KEYS, ROWS, mma_fp8)
                part, score = warpgroup_mma_wait(2, deps=(pending, score))
                pending = following
            else:
                part, score = warpgroup_mma_wait(0, deps=(pending, score))
            factor = scale_ring.index(stage * BLOCKS + i).load(by_key)
            score += gl.convert_layout(part, mma, assert_trivial=True) * factor[:, None]
        score = score * unit[None, :]
        if (start + KEYS > whole_end) | (start < whole_start):
            key = start + gl.arange(0, KEYS, by_key)
            last = length - number_of_queries + (row_start + gl.arange(0, ROWS, by_row)) // heads
            earliest = gl.maximum(first, last - window + 1)
            visible = (key[:, None] <= last[None, :]) & (key[:, None] >= earliest[None, :]) & (key < high)[:, None]
            score = gl.where(visible, score, float("-inf"))
        new_maximum = gl.maximum(maximum, gl.max(score, 0))
        finite = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = gl.exp2(maximum - finite)
        weight = gl.exp2(score - finite[None, :])
        of_thread = gl.convert_layout(shrink, thread_row, assert_trivial=True)
        weights = weights * of_thread[None, None, :] + _sum_in_thread(weight)
        maximum = new_maximum
        probability.store(weight.to(gl.float16))
        fence_async_shared()
        barrier()

        # Half a tile at a time: the tensor cores read one half while the next is expanded.
        grown = ()
        for i in gl.static_range(2 * BLOCKS):
            n = stage * BLOCKS + i // 2
            pairs = pair_ring.index(n).slice(i % 2 * HALF, HALF).permute((1, 0)).load(operand)
            factor = scale_ring.index(n).slice(i % 2 * HALF, HALF).load(gl.SliceLayout(0, operand))
            factor = (factor * LIFT).to(gl.float16)
            even, odd = _expand(pairs)
            even = even * factor[None, :]
            odd = odd * factor[None, :]
            if i > 0:
                done = warpgroup_mma_wait(0, deps=(even_out, odd_out, even_before, odd_before))
                even_out = done[0]
                odd_out = done[1]
            if i % 2 == 0:
                if i > 0:
                    grown = grown + (even_out, odd_out)
                even_out = out[i] * shrink[None, :]
                odd_out = out[i + 1] * shrink[None, :]
            part = probability.slice(i % 2 * HALF, HALF)
            even_out = warpgroup_mma(even, part, even_out, is_async=True)
            odd_out = warpgroup_mma(odd, part, odd_out, is_async=True)
            even_before = even
            odd_before = odd
        done = warpgroup_mma_wait(0, deps=(even_out, odd_out, even_before, odd_before))
        out = grown + (done[0], done[1])
        # One thread signals for the group, so all threads must have finished reading.
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        phase = gl.where(stage + 2 >= STAGES, phase ^ 1, phase)
        stage = gl.where(stage + 2 >= STAGES, stage + 2 - STAGES, stage + 2)

    total = gl.convert_layout(gl.sum(gl.sum(weights, 0), 0), by_row)
    if FIRST:
        barrier()
        mbarrier.arrive(free, count=1)
        mbarrier.wait(ready, 0)
        other = partial_max.load(by_row)
        highest = gl.maximum(maximum, other)
        finite = gl.where(highest == float("-inf"), 0.0, highest)
        mine = gl.exp2(maximum - finite)
        theirs = gl.exp2(other - finite)
        total = total * mine + partial_sum.load(by_row) * theirs
        inverse = 1.0 / (LIFT * gl.where(total > 0, total, 1.0))
        row = row_start + gl.arange(0, ROWS, by_row)
        row_live = row < number_of_queries * heads
        rows = Out + row // heads * out_token + row % heads * out_head
        for i in gl.static_range(2 * BLOCKS):
            column = i // 2 * BLOCK + i % 2 + 2 * gl.arange(0, PAIRS, by_key)
            tile = out[i] * (mine * inverse)[None, :] + partial.index(i).load(mma) * (theirs * inverse)[None, :]
            gl.store(rows[None, :] + column[:, None], tile.to(Out.dtype.element_ty), mask=row_live[None, :])
        gl.store(
            Lse + row // heads * lse_token + row % heads,
            (highest + gl.log2(total)) * 0.6931471805599453,
            mask=row_live,
        )
    else:
        # The partial results take the memory of the ring, once the other group has read its last tile.
        mbarrier.wait(free, 0)
        partial_max.store(maximum)
        partial_sum.store(total)
        for i in gl.static_range(2 * BLOCKS):
            partial.index(i).store(out[i])
        barrier()
        mbarrier.arrive(ready, count=1)


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
    """Compute `portable.attend` on FP8 keys of one group that are their own values; CONSUMERS is 2.

    HEAD has chunks of 128, KEYS is 64, STAGES at least 2; four warps. `kr_batch` and `kr_token` count eights.
    """
    BLOCKS: gl.constexpr = len(HEAD)
    split = gl.program_id(0)
    row_start = gl.program_id(1) * ROWS
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

    if PAGE == 0:
        K += batch * k_batch
        KScale += batch * ks_batch
        Table = K
    else:
        Table += batch * table_batch
    if len(ROPE) == 0:
        KRope = K
        QRope = Q
    elif PAGE == 0:
        KRope += batch * kr_batch * 8
    Q += batch * q_batch
    QRope += batch * qr_batch
    Out += split.to(gl.int64) * out_split + batch * out_batch
    Lse += split.to(gl.int64) * lse_split + batch * lse_batch

    dtype: gl.constexpr = Q.dtype.element_ty
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_layout: gl.constexpr = _shared(KEYS, BLOCK, gl.float8e4nv)
    k_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * BLOCKS, KEYS, BLOCK], k_layout)
    rope_ring = _ring(ROPE, STAGES, KEYS, dtype)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES * BLOCKS, KEYS], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(stage), count=1)
    for turn in gl.static_range(2):
        mbarrier.init(turns.index(turn), count=1)

    q_layout: gl.constexpr = _shared(ROWS, BLOCK, gl.float8e4nv)
    q_high = gl.allocate_shared_memory(gl.float8e4nv, [BLOCKS, ROWS, BLOCK], q_layout)
    q_low = gl.allocate_shared_memory(gl.float8e4nv, [BLOCKS, ROWS, BLOCK], q_layout)
    units = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    q_rope = _ring(ROPE, 1, ROWS, dtype)
    split_queries = (q_high, q_low, q_rope, units)
    _split_queries(
        Q, QRope, q_token, q_head, qr_token, qr_head, row_start, queries, heads_per_group, split_queries,
        ROPE, BLOCKS, ROWS,
    )  # fmt: skip
    fence_async_shared()
    barrier()

    swizzled: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 8, [1, 0])
    partial = k_ring._reinterpret(gl.float32, [2 * BLOCKS, PAIRS, ROWS], swizzled)
    partial_max = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    partial_sum = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    handed = (partial, partial_max, partial_sum, turns.index(0), turns.index(1))
    source = (K, KRope, KScale, Table, k_batch, k_token, kr_batch, kr_token, ks_batch, ks_token)
    rows_of = (Out, Lse, out_token, out_head, lse_token)
    mask = (queries, heads_per_group, first, length, window)
    rings = (k_ring, rope_ring, scale_ring, full, empty)
    gl.warp_specialize(
        [
            (_consume, (rows_of, mask, rings, split_queries, handed, row_start, scale, low, high,
                ROPE, BLOCKS, ROWS, KEYS, STAGES, True)),
            (_consume, (rows_of, mask, rings, split_queries, handed, row_start, scale, low, high,
                ROPE, BLOCKS, ROWS, KEYS, STAGES, False)),
            (_produce, (source, rings, low, high, ROPE, BLOCKS, KEYS, PAGE, STAGES)),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
