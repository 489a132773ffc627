"""Decode on latents in FP8 on Hopper: the function of `portable.attend` with scales, with specialized warps.

Producer warps copy keys into a ring of shared-memory tiles (`fp8_copies`). One or two groups of consumer warps
compute, a warp for 16 keys. Two groups take every second tile each, and merge their results. No tile is expanded in
shared memory:

- Scores are products in FP8. The query is the sum of two e4m3 numbers, scaled by its largest element, which holds
  it as exactly as bfloat16 does. Both stand side by side in one operand, so that keys are read once. The scale of a
  block multiplies the partial scores.
- Values are read as pairs of numbers with the transposing load of 16-bit elements, and expanded to float16 in
  registers. Even and odd columns have accumulators of their own, and the warps divide the columns.
- The largest scale of a key multiplies its weight, and a block's share of it (at most one) multiplies the value.
  The exponent of the weights is relative to a running reference: the largest product of weight and scale so far. So
  latents of any size fit into float16, exact relative to the largest contribution.
- The reference moves only when a product would leave float16. Then, and only then, the warps agree on the largest
  one, and the accumulators are rescaled.
- A stage of the ring is freed pair by pair of blocks, so that a copy starts before the tile is done.
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

from headwise.kernels.decode.fp8_copies import BLOCK, _produce
from headwise.kernels.decode.fp8_tiles import (
    PAIRS,
    _inverse,
    _leaves_float16,
    _log2,
    _mma_rest,
    _of_threads,
    _rest_values,
    _scales,
    _scores,
    _split_queries,
    _sum_in_thread,
    _values,
)
from headwise.kernels.decode.hopper import LOWEST, PRODUCER_WARPS, _ring, _shared, barrier, exp2

# Products of values that are in flight, in pairs of even and odd columns.
AHEAD = gl.constexpr(2)
# Products of weight and scale are stored so many times (log2) larger than the largest one was at the last change of
# the reference, and may grow to 2^15. Smaller ones keep all digits down to 2^-20, and some down to 2^-30.
LIFT = gl.constexpr(6.0)
# No key has a smaller scale than this in the reference, so that keys of zeros have one.
SMALLEST = gl.constexpr(2.0**-60)


@gluon.jit
def _consume(
    rows_of, mask, rings, sources, shared, row_start, scale, low, high,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, QUAD: gl.constexpr, PARTS: gl.constexpr, FENCE: gl.constexpr,
):  # fmt: skip
    """Attend from ROWS query rows to every GROUPS-th tile in the rings, and store output and log-sum-exp.

    FENCE: copies are ordinary writes of other warps, without a fence after them.
    """
    Out, Lse, out_token, out_head, lse_token = rows_of
    number_of_queries, heads, first, length, window = mask
    k_rings, rope_ring, scale_ring, full, empty = rings
    Q, QRope, q_token, q_head, qr_token, qr_head = sources
    EVEN: gl.constexpr = BLOCKS // 2
    # With four blocks, two groups of warps have registers for less at once; where rows are copied, with three.
    FEW: gl.constexpr = GROUPS > 1 and (BLOCKS > 3 or (BLOCKS > 2 and FENCE))
    FLIGHT: gl.constexpr = 1 if FEW else 2
    STEP: gl.constexpr = 16 if FEW else 32
    STEPS: gl.constexpr = KEYS // STEP
    warps: gl.constexpr = gl.num_warps()
    # Warps divide keys and columns; where an odd block is left, its columns and the rows.
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, ROWS, 16])
    mma_rest: gl.constexpr = _mma_rest(warps, ROWS)
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    operand_rest: gl.constexpr = gl.DotOperandLayout(0, mma_rest, 2)
    by_row: gl.constexpr = gl.SliceLayout(0, mma)
    by_key: gl.constexpr = gl.SliceLayout(1, mma)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    both, q_rope, units, ready, partial, partial_rows, handed = shared
    if GROUP == 0:
        _split_queries(
            Q, QRope, q_token, q_head, qr_token, qr_head, row_start, number_of_queries, heads,
            (both, q_rope, units), ROPE, BLOCKS, ROWS,
        )  # fmt: skip
        fence_async_shared()
        barrier()
        if GROUPS > 1:
            mbarrier.arrive(ready, count=1)
    else:
        mbarrier.wait(ready, 0)
    unit = units.load(by_row) * scale

    probability = gl.allocate_shared_memory(gl.float16, [KEYS, ROWS], _shared(KEYS, ROWS, gl.float16))
    # A buffer for each pair of blocks: stores into one need no barriers between them.
    shares = ()
    for i in gl.static_range(EVEN):
        shares = shares + (gl.allocate_shared_memory(gl.float16, [2, KEYS], plain),)
    rest_shares = gl.allocate_shared_memory(gl.float16, [KEYS], flat)
    flags = gl.allocate_shared_memory(gl.int32, [warps, 32], plain)
    of_warp: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])
    of_all: gl.constexpr = gl.BlockedLayout([warps, 1], [1, 32], [1, warps], [1, 0])
    if EVEN > 0:
        pair_ring = k_rings[0]._reinterpret(gl.int16, [STAGES * EVEN, KEYS, BLOCK], _shared(KEYS, BLOCK, gl.int16))
    if BLOCKS % 2 > 0:
        rest_ring = k_rings[1]._reinterpret(gl.int16, [STAGES, KEYS, PAIRS], _shared(KEYS, PAIRS, gl.int16))

    reference = gl.full([ROWS], LOWEST, gl.float32, by_row)
    # Sums of weights over the keys of one thread.
    weights = _sum_in_thread(gl.zeros([KEYS, ROWS], gl.float32, mma))
    thread_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, weights.type.layout))
    out = ()
    for i in gl.static_range(2 * EVEN):
        out = out + (gl.zeros((BLOCK, ROWS), gl.float32, mma),)
    rest = ()
    for i in gl.static_range(BLOCKS % 2 * 2):
        rest = rest + (gl.zeros((PAIRS, ROWS), gl.float32, mma_rest),)

    # Between these bounds every query sees every key.
    whole_start = gl.maximum(first, length - window)
    whole_end = gl.minimum(high, length - number_of_queries + 1)
    stage = GROUP
    phase = 0
    for start in range(low + GROUP * KEYS, high, GROUPS * KEYS):
        mbarrier.wait(full.index(stage), phase)
        if FENCE:
            # Copies row by row are ordinary writes, and the tensor cores read through the asynchronous proxy.
            fence_async_shared()
        # 0, which the compiler does not know: addresses that it is added to, and the rows of the mask, are computed
        # in every tile, and take no registers between.
        zero = start >> 31
        scales = _scales(scale_ring, stage, BLOCKS, KEYS, QUAD, by_key)
        largest = gl.full([KEYS], SMALLEST, gl.float32, by_key)
        for i in gl.static_range(BLOCKS):
            largest = gl.maximum(largest, scales[i])
        score = _scores(
            k_rings, rope_ring, stage, both, q_rope, zero, scales, ROPE, BLOCKS, ROWS, KEYS, FLIGHT, mma
        )
        if (start + KEYS > whole_end) | (start < whole_start):
            key = start + gl.arange(0, KEYS, by_key)
            last = length - number_of_queries + (row_start + zero + gl.arange(0, ROWS, by_row)) // heads
            earliest = gl.maximum(first, last - window + 1)
            visible = (key[:, None] <= last[None, :]) & (key[:, None] >= earliest[None, :]) & (key < high)[:, None]
            score = gl.where(visible, score, float("-inf"))
        weight = exp2(gl.fma(score, unit[None, :], 0.0 - reference[None, :]))
        product = weight * largest[:, None]
        probability.store(product.to(gl.float16))
        inverse = _inverse(largest)
        for i in gl.static_range(EVEN):
            pair = gl.join(scales[2 * i] * inverse, scales[2 * i + 1] * inverse).permute((1, 0))
            shares[i].store(pair.to(gl.float16))
        if BLOCKS % 2 > 0:
            rest_shares.store((scales[BLOCKS - 1] * inverse).to(gl.float16))
        of_thread = gl.max(gl.max(gl.max(_of_threads(product), 5), 3), 1).reshape([warps, 32])
        flags.store(_leaves_float16(gl.convert_layout(of_thread, of_warp, assert_trivial=True)))
        fence_async_shared()
        barrier()
        if gl.max(gl.max(flags.slice(0, 1, 1).load(of_all), 1), 0) > 0:
            highest = gl.max(gl.fma(score, unit[None, :], _log2(largest)[:, None]), 0) - LIFT
            raised = gl.maximum(reference, highest)
            shrink = exp2(reference - raised)
            reference = raised
            weight = exp2(gl.fma(score, unit[None, :], 0.0 - reference[None, :]))
            probability.store((weight * largest[:, None]).to(gl.float16))
            weights = weights * gl.convert_layout(shrink, thread_row)[None, None, :]
            shrunk = ()
            for i in gl.static_range(2 * EVEN):
                shrunk = shrunk + (out[i] * shrink[None, :],)
            out = shrunk
            if BLOCKS % 2 > 0:
                of_rest = gl.convert_layout(shrink, gl.SliceLayout(0, mma_rest))
                rest = (rest[0] * of_rest[None, :], rest[1] * of_rest[None, :])
            fence_async_shared()
            barrier()
        weights += _sum_in_thread(weight)

        # A step at a time: while the tensor cores work at one step, the next one is expanded.
        grown = ()
        used = ()
        for i in gl.static_range(EVEN * STEPS):
            tile = pair_ring.index(stage * EVEN + i // STEPS)
            even, odd = _values(tile, shares[i // STEPS], i % STEPS * STEP, STEP, operand)
            if i >= AHEAD:
                warpgroup_mma_wait(2 * AHEAD - 2, deps=(used[2 * (i - AHEAD)], used[2 * (i - AHEAD) + 1]))
            if i % STEPS == 0:
                even_out = out[i // STEPS * 2]
                odd_out = out[i // STEPS * 2 + 1]
            part = probability.slice(i % STEPS * STEP, STEP)
            even_out = warpgroup_mma(even, part, even_out, is_async=True)
            odd_out = warpgroup_mma(odd, part, odd_out, is_async=True)
            used = used + (even, odd)
            if i % STEPS == STEPS - 1:
                grown = grown + (even_out, odd_out)
                if i // STEPS < PARTS - 1:
                    # These blocks are in registers: the next tile may take their memory.
                    barrier()
                    mbarrier.arrive(empty.index(stage * PARTS + i // STEPS), count=1)
        if BLOCKS % 2 > 0:
            for i in gl.static_range(STEPS):
                even, odd = _rest_values(rest_ring.index(stage), rest_shares, i * STEP, STEP, operand_rest)
                if len(used) >= 2 * AHEAD:
                    warpgroup_mma_wait(
                        2 * AHEAD - 2, deps=(used[len(used) - 2 * AHEAD], used[len(used) - 2 * AHEAD + 1])
                    )
                if i == 0:
                    even_out = rest[0]
                    odd_out = rest[1]
                part = probability.slice(i * STEP, STEP)
                even_out = warpgroup_mma(even, part, even_out, is_async=True)
                odd_out = warpgroup_mma(odd, part, odd_out, is_async=True)
                used = used + (even, odd)
            grown = grown + (even_out, odd_out)
        for i in gl.static_range(2 * min(AHEAD, len(used) // 2)):
            grown = grown + (used[len(used) - 1 - i],)
        done = warpgroup_mma_wait(0, deps=grown)
        out = ()
        for i in gl.static_range(2 * EVEN):
            out = out + (done[i],)
        if BLOCKS % 2 > 0:
            rest = (done[2 * EVEN], done[2 * EVEN + 1])
        # One thread signals for the group, so all threads must have finished reading.
        barrier()
        mbarrier.arrive(empty.index(stage * PARTS + PARTS - 1), count=1)
        phase = gl.where(stage + GROUPS >= STAGES, phase ^ 1, phase)
        stage = gl.where(stage + GROUPS >= STAGES, stage + GROUPS - STAGES, stage + GROUPS)

    total = gl.convert_layout(gl.sum(gl.sum(weights, 0), 0), by_row)
    if GROUPS > 1:
        out, rest, total, reference = _merge(
            out, rest, total, reference, partial, partial_rows, handed, BLOCKS, GROUP
        )
    inverse = 1.0 / gl.where(total > 0, total, 1.0)
    row = row_start + gl.arange(0, ROWS, by_row)
    live = row < number_of_queries * heads
    lse = Lse + row // heads * lse_token + row % heads
    if GROUP == 0:
        gl.store(lse, (reference + gl.log2(total)) * 0.6931471805599453, mask=live)
    for i in gl.static_range(EVEN):
        if i % GROUPS == GROUP:
            _store(Out, out[2 * i], out[2 * i + 1], inverse, row, live, heads, out_token, out_head, 2 * i * BLOCK)
    if BLOCKS % 2 > 0 and EVEN % GROUPS == GROUP:
        row = row_start + gl.arange(0, ROWS, gl.SliceLayout(0, mma_rest))
        live = row < number_of_queries * heads
        inverse = gl.convert_layout(inverse, gl.SliceLayout(0, mma_rest))
        _store(Out, rest[0], rest[1], inverse, row, live, heads, out_token, out_head, 2 * EVEN * BLOCK)


@gluon.jit
def _merge(
    out, rest, total, reference, partial, partial_rows, handed, BLOCKS: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Return the results of both groups in the pairs of blocks that this group stores, every second one."""
    EVEN: gl.constexpr = BLOCKS // 2
    by_row: gl.constexpr = reference.type.layout
    # Each group hands over what the other one stores. The memory of the ring is free when both have read it.
    partial_rows.index(2 * GROUP).store(reference)
    partial_rows.index(2 * GROUP + 1).store(total)
    barrier()
    mbarrier.arrive(handed.index(GROUP), count=1)
    mbarrier.wait(handed.index(1 - GROUP), 0)
    other = partial_rows.index(2 - 2 * GROUP).load(by_row)
    highest = gl.maximum(reference, other)
    mine = exp2(reference - highest)
    theirs = exp2(other - highest)
    total = total * mine + partial_rows.index(3 - 2 * GROUP).load(by_row) * theirs
    for i in gl.static_range(EVEN):
        if i % 2 != GROUP:
            partial[0].index(2 * i).store(out[2 * i])
            partial[0].index(2 * i + 1).store(out[2 * i + 1])
    if BLOCKS % 2 > 0 and EVEN % 2 != GROUP:
        partial[1].index(0).store(rest[0])
        partial[1].index(1).store(rest[1])
    barrier()
    mbarrier.arrive(handed.index(2 + GROUP), count=1)
    mbarrier.wait(handed.index(3 - GROUP), 0)
    merged = ()
    for i in gl.static_range(2 * EVEN):
        if i // 2 % 2 == GROUP:
            there = partial[0].index(i).load(out[i].type.layout)
            merged = merged + (out[i] * mine[None, :] + there * theirs[None, :],)
        else:
            merged = merged + (out[i],)
    if BLOCKS % 2 > 0 and EVEN % 2 == GROUP:
        mma_rest: gl.constexpr = rest[0].type.layout
        rest_mine = gl.convert_layout(mine, gl.SliceLayout(0, mma_rest))
        rest_theirs = gl.convert_layout(theirs, gl.SliceLayout(0, mma_rest))
        rest = (
            rest[0] * rest_mine[None, :] + partial[1].index(0).load(mma_rest) * rest_theirs[None, :],
            rest[1] * rest_mine[None, :] + partial[1].index(1).load(mma_rest) * rest_theirs[None, :],
        )
    return merged, rest, total, highest


@gluon.jit
def _store(Out, even, odd, inverse, row, live, heads, out_token, out_head, START: gl.constexpr):
    """Store the even and the odd columns (columns, rows) beside each other, from column START on."""
    tile = gl.join(even * inverse[None, :], odd * inverse[None, :]).to(Out.dtype.element_ty)
    across: gl.constexpr = gl.SliceLayout(2, tile.type.layout)
    number: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, tile.type.layout))
    column = START + 2 * gl.arange(0, tile.shape[0], gl.SliceLayout(1, across))
    rows = gl.convert_layout(row // heads * out_token + row % heads * out_head, gl.SliceLayout(0, across))
    mask = gl.convert_layout(live, gl.SliceLayout(0, across))
    place = (rows[None, :] + column[:, None])[:, :, None] + gl.arange(0, 2, number)[None, None, :]
    gl.store(Out + place, tile, mask=mask[None, :, None])


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
    CONSUMERS: gl.constexpr, BOX: gl.constexpr, QUAD: gl.constexpr, KeyBoxes, RopeBoxes,
):  # fmt: skip
    """Compute `portable.attend` on FP8 keys of one group that are their own values.

    HEAD has chunks of 128, ROWS is 16 or 32. One or two CONSUMERS share the rows: groups of KEYS / 16 warps. STAGES
    is at least 2, and even with two of them. BOX, QUAD and both maps are those of `fp8_copies.copy_options`.
    `kr_batch` and `kr_token` count eights. `scale` is above 0, since scores are masked before they are scaled.
    """
    BLOCKS: gl.constexpr = len(HEAD)
    # With an odd number both groups would share stages, and one could take a tile a round early.
    gl.static_assert(CONSUMERS == 1 or STAGES % 2 == 0)
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
    floor = gl.maximum(first, length - queries - window + 1)
    low = floor
    if PAGE > 0 and BOX > 0:
        # A box must not leave its page: the first tile begins at a box, and keys below `floor` become zeros.
        low = low // BOX * BOX
    span = gl.cdiv(gl.cdiv(gl.maximum(length - low, 0), gl.num_programs(0)), KEYS) * KEYS
    low += split * span
    high = gl.minimum(low + span, length)

    if PAGE == 0:
        K += batch * k_batch
        if QUAD:
            KScale += batch * (ks_batch // 4 * 4)
        else:
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
    EVEN: gl.constexpr = BLOCKS // 2 * 2
    k_layout: gl.constexpr = _shared(KEYS, BLOCK, gl.float8e4nv)
    if BLOCKS == 1:
        one = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, KEYS, BLOCK], k_layout)
        k_rings = (one, one)
    else:
        pairs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * EVEN, KEYS, BLOCK], k_layout)
        if BLOCKS % 2 == 0:
            k_rings = (pairs, pairs)
        else:
            k_rings = (pairs, gl.allocate_shared_memory(gl.float8e4nv, [STAGES, KEYS, BLOCK], k_layout))
    rope_ring = _ring(ROPE, STAGES, KEYS, dtype)
    if QUAD:
        quads: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS, 4], quads)
    else:
        scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES * BLOCKS, KEYS], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # A stage becomes free as a whole, or pair of blocks by pair of blocks.
    PARTS: gl.constexpr = (BLOCKS + 1) // 2
    empty = gl.allocate_shared_memory(gl.int64, [STAGES * PARTS, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(STAGES * PARTS):
        mbarrier.init(empty.index(part), count=1)
    # Of two groups: sums of each and results of each are handed over, and the queries are ready.
    handed = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    # The threads that copy row by row signal each; one more signal counts the bytes of boxes.
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=33 if BOX > 0 else 32 * PRODUCER_WARPS)
    for i in gl.static_range(5):
        mbarrier.init(handed.index(i), count=1)
    both = gl.allocate_shared_memory(
        gl.float8e4nv, [BLOCKS, 2 * ROWS, BLOCK], _shared(2 * ROWS, BLOCK, gl.float8e4nv)
    )
    units = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    q_rope = ()
    for i in gl.static_range(len(ROPE)):
        q_rope = q_rope + (gl.allocate_shared_memory(dtype, [ROWS, ROPE[i][1]], _shared(ROWS, ROPE[i][1], dtype)),)
    partial_rows = gl.allocate_shared_memory(gl.float32, [4, ROWS], flat)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    partial = ()
    if CONSUMERS > 1:
        if EVEN > 0:
            partial = partial + (k_rings[0]._reinterpret(gl.float32, [EVEN, BLOCK, ROWS], plain),)
        else:
            partial = partial + (k_rings[0],)
        if BLOCKS % 2 > 0:
            partial = partial + (k_rings[1]._reinterpret(gl.float32, [2, BLOCK // 2, ROWS], plain),)
    fence_async_shared()
    barrier()

    source = (K, KRope, KScale, Table, k_batch, k_token, kr_batch, kr_token, ks_batch, ks_token)
    rows_of = (Out, Lse, out_token, out_head, lse_token)
    mask = (queries, heads_per_group, first, length, window)
    rings = (k_rings, rope_ring, scale_ring, full, empty)
    sources = (Q, QRope, q_token, q_head, qr_token, qr_head)
    shared = (both, q_rope, units, handed.index(4), partial, partial_rows, handed)
    if BOX > 0:
        if PAGE == 0:
            batch_rows = batch * (k_batch // k_token)
        else:
            batch_rows = k_batch // k_token
        if len(ROPE) > 0:
            boxes = (KeyBoxes, RopeBoxes, batch_rows)
        else:
            boxes = (KeyBoxes, KeyBoxes, batch_rows)
    else:
        boxes = (0, 0, 0)
    # One warp starts boxes; several copy row by row.
    PRODUCERS: gl.constexpr = 1 if BOX > 0 else PRODUCER_WARPS
    PRODUCER_REGISTERS: gl.constexpr = 24 if BOX > 0 else 56
    FENCE: gl.constexpr = BOX == 0
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (rows_of, mask, rings, sources, shared, row_start, scale, low, high,
                    ROPE, BLOCKS, ROWS, KEYS, STAGES, 0, 1, QUAD, PARTS, FENCE)),
                (_produce, (source, boxes, rings, floor, low, high,
                    ROPE, BLOCKS, KEYS, PAGE, STAGES, BOX, QUAD, PARTS)),
            ],
            [PRODUCERS],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (rows_of, mask, rings, sources, shared, row_start, scale, low, high,
                    ROPE, BLOCKS, ROWS, KEYS, STAGES, 0, 2, QUAD, PARTS, FENCE)),
                (_consume, (rows_of, mask, rings, sources, shared, row_start, scale, low, high,
                    ROPE, BLOCKS, ROWS, KEYS, STAGES, 1, 2, QUAD, PARTS, FENCE)),
                (_produce, (source, boxes, rings, floor, low, high,
                    ROPE, BLOCKS, KEYS, PAGE, STAGES, BOX, QUAD, PARTS)),
            ],
            [4, PRODUCERS],
            [240 if BOX > 0 else 224, PRODUCER_REGISTERS],
        )  # fmt: skip
