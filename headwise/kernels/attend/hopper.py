"""The decode kernel for Hopper: the same function as `portable.attend`, with the pipeline written by hand.

What Triton's own pipeliner does not give: the next tile's copy starts before this tile's arithmetic, so two tiles
of shared memory are enough to keep the memory busy (at rank 512 three do not fit); copies by 128-byte row
segments, which need a quarter of the address registers; and the page numbers of the tile after next are fetched
a step ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.constexpr_function
def _shared(rows, width, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, width], dtype)


@gluon.jit
def _ring(CHUNKS: gl.constexpr, DEPTH: gl.constexpr, KEYS: gl.constexpr, dtype: gl.constexpr):
    """DEPTH tiles (KEYS, width) for each chunk of columns."""
    tiles = ()
    for i in gl.static_range(len(CHUNKS)):
        tile = gl.allocate_shared_memory(
            dtype, [DEPTH, KEYS, CHUNKS[i][1]], _shared(KEYS, CHUNKS[i][1], dtype)
        )
        tiles = tiles + (tile,)
    return tiles


@gluon.jit
def _fetch(ring, slot, rows, live, CHUNKS: gl.constexpr, COPY: gl.constexpr):
    """Start copying one tile; dead rows are filled with zeros, whatever the cache holds there."""
    for i in gl.static_range(len(CHUNKS)):
        column = CHUNKS[i][0] + gl.arange(0, CHUNKS[i][1], gl.SliceLayout(0, COPY))
        async_copy.async_copy_global_to_shared(
            ring[i].index(slot), rows[:, None] + column[None, :], mask=live[:, None]
        )


@gluon.jit
def _queries(rows, live, ROWS: gl.constexpr, CHUNKS: gl.constexpr, COPY: gl.constexpr, dtype: gl.constexpr):
    tiles = ()
    for i in gl.static_range(len(CHUNKS)):
        column = CHUNKS[i][0] + gl.arange(0, CHUNKS[i][1], gl.SliceLayout(0, COPY))
        q = gl.load(rows[:, None] + column[None, :], mask=live[:, None], other=0.0)
        tile = gl.allocate_shared_memory(dtype, [ROWS, CHUNKS[i][1]], _shared(ROWS, CHUNKS[i][1], dtype), q)
        tiles = tiles + (tile,)
    return tiles


@gluon.jit
def _add_scores(score, ring, slot, queries, CHUNKS: gl.constexpr):
    for i in gl.static_range(len(CHUNKS)):
        score = warpgroup_mma(ring[i].index(slot), queries[i].permute((1, 0)), score, is_async=True)
    return score


@gluon.jit(do_not_specialize=["queries", "heads_per_group", "capacity", "window", "lse_split", "lse_batch"])
def attend(
    Q, QRope, K, KRope, V, Lengths, Starts, Table, Out, Lse, scale,
    q_batch, q_token, q_head, qr_batch, qr_token, qr_head,
    k_batch, k_token, k_group, kr_batch, kr_token, v_batch, v_token, v_group, table_batch,
    out_split, out_batch, out_token, out_head, lse_split, lse_batch, lse_token,
    queries, heads_per_group, capacity, window,
    HEAD: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, VALUE_IS_KEY: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `portable.attend`; every value chunk must be at least 64 wide, KEYS at least 64 and STAGES at least 2."""
    dtype: gl.constexpr = K.dtype.element_ty
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, warps // 4], [16, ROWS // (warps // 4), 16])
    by_row: gl.constexpr = gl.SliceLayout(0, mma)
    by_key: gl.constexpr = gl.SliceLayout(1, mma)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])
    copied: gl.constexpr = gl.SliceLayout(1, copy)

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

    K += group * k_group
    V += group * v_group
    if PAGE == 0:
        K += batch * k_batch
        V += batch * v_batch
        if len(ROPE) > 0:
            KRope += batch * kr_batch
    else:
        Table += batch * table_batch
    k_ring = _ring(HEAD, STAGES, KEYS, dtype)
    rope_ring = _ring(ROPE, STAGES, KEYS, dtype)
    if VALUE_IS_KEY:
        v_ring = k_ring
    else:
        v_ring = _ring(VALUE, STAGES, KEYS, dtype)

    key = low + gl.arange(0, KEYS, copied)
    for stage in gl.static_range(STAGES - 1):
        live = key < high
        if PAGE == 0:
            block = 0
            slot = key
        else:
            block = gl.load(Table + key // PAGE, mask=live, other=0).to(gl.int64)
            slot = key % PAGE
        _fetch(k_ring, stage, K + block * k_batch + slot * k_token, live, HEAD, copy)
        if len(ROPE) > 0:
            _fetch(rope_ring, stage, KRope + block * kr_batch + slot * kr_token, live, ROPE, copy)
        if not VALUE_IS_KEY:
            _fetch(v_ring, stage, V + block * v_batch + slot * v_token, live, VALUE, copy)
        async_copy.commit_group()
        key += KEYS
    if PAGE != 0:
        next_block = gl.load(Table + key // PAGE, mask=key < high, other=0).to(gl.int64)

    row = row_start + gl.arange(0, ROWS, copied)
    token = row // heads_per_group
    head = group * heads_per_group + row % heads_per_group
    row_live = row < queries * heads_per_group
    q = _queries(Q + batch * q_batch + token * q_token + head * q_head, row_live, ROWS, HEAD, copy, dtype)
    if len(ROPE) > 0:
        rope_rows = QRope + batch * qr_batch + token * qr_token + head * qr_head
        q_rope = _queries(rope_rows, row_live, ROWS, ROPE, copy, dtype)

    row = row_start + gl.arange(0, ROWS, by_row)
    token = row // heads_per_group
    last = length - queries + token
    earliest = gl.maximum(first, last - window + 1)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, by_row)
    weights = gl.zeros([KEYS, ROWS], gl.float32, mma)
    out = ()
    for i in gl.static_range(len(VALUE)):
        out = out + (gl.zeros((gl.constexpr(VALUE[i][1]), ROWS), gl.float32, mma),)
    p_layout: gl.constexpr = _shared(KEYS, ROWS, dtype)
    probability = gl.allocate_shared_memory(dtype, [KEYS, ROWS], p_layout)

    now = 0
    ahead = STAGES - 1
    for start in range(low, high, KEYS):
        async_copy.wait_group(STAGES - 2)
        # Copies are ordinary writes; the tensor cores read through the asynchronous proxy.
        fence_async_shared()
        gl.thread_barrier()
        live = key < high
        if PAGE == 0:
            block = 0
            slot = key
        else:
            block = next_block
            slot = key % PAGE
        _fetch(k_ring, ahead, K + block * k_batch + slot * k_token, live, HEAD, copy)
        if len(ROPE) > 0:
            _fetch(rope_ring, ahead, KRope + block * kr_batch + slot * kr_token, live, ROPE, copy)
        if not VALUE_IS_KEY:
            _fetch(v_ring, ahead, V + block * v_batch + slot * v_token, live, VALUE, copy)
        async_copy.commit_group()
        key += KEYS
        if PAGE != 0:
            next_block = gl.load(Table + key // PAGE, mask=key < high, other=0).to(gl.int64)

        score = gl.zeros([KEYS, ROWS], gl.float32, mma)
        score = _add_scores(score, k_ring, now, q, HEAD)
        if len(ROPE) > 0:
            score = _add_scores(score, rope_ring, now, q_rope, ROPE)
        score = warpgroup_mma_wait(0, deps=(score,))

        at = start + gl.arange(0, KEYS, by_key)
        seen = (at[:, None] <= last[None, :]) & (at[:, None] >= earliest[None, :]) & (at < high)[:, None]
        score = gl.where(seen, score * scale, float("-inf"))
        new_maximum = gl.maximum(maximum, gl.max(score, 0))
        finite = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = gl.exp2(maximum - finite)
        weight = gl.exp2(score - finite[None, :])
        weights = weights * shrink[None, :] + weight
        maximum = new_maximum
        probability.store(weight.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        pending = ()
        for i in gl.static_range(len(VALUE)):
            value = v_ring[i].index(now).permute((1, 0))
            pending = pending + (warpgroup_mma(value, probability, out[i] * shrink[None, :], is_async=True),)
        out = ()
        for i in gl.static_range(len(VALUE)):
            out = out + (warpgroup_mma_wait(0, deps=(pending[i],)),)
        now = gl.where(now == STAGES - 1, 0, now + 1)
        ahead = gl.where(ahead == STAGES - 1, 0, ahead + 1)

    # The last tiles asked for lie beyond the end, yet their zeros must land before the memory serves again.
    async_copy.wait_group(0)
    gl.thread_barrier()
    total = gl.sum(weights, 0)
    inverse = 1.0 / gl.where(total > 0, total, 1.0)
    row_live = row < queries * heads_per_group
    head = group * heads_per_group + row % heads_per_group
    rows = Out + split.to(gl.int64) * out_split + batch * out_batch + token * out_token + head * out_head
    for i in gl.static_range(len(VALUE)):
        column = VALUE[i][0] + gl.arange(0, VALUE[i][1], by_key)
        tile = (out[i] * inverse[None, :]).to(Out.dtype.element_ty)
        gl.store(rows[None, :] + column[:, None], tile, mask=row_live[None, :])
    lse = Lse + split.to(gl.int64) * lse_split + batch * lse_batch + token * lse_token + head
    gl.store(lse, (maximum + gl.log2(total)) * 0.6931471805599453, mask=row_live)
