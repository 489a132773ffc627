"""Decode on every card that Triton supports, and merge the splits.

Both products are transposed (keys or value columns along M, query rows along N). A few query heads then fill the
narrow side of the tensor-core tile exactly; the usual orientation pads them to 64.
"""

# Triton compiles a part of Python only: no starred tuples, no conditional expressions on None.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from headwise.kernels.decode import latent_fp8

BLOCK = tl.constexpr(latent_fp8.BLOCK)


@triton.jit
def _columns(rows, START: tl.constexpr, WIDTH: tl.constexpr, live):
    column = START + tl.arange(0, WIDTH)
    return tl.load(rows[:, None] + column[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _columns_across(rows, CHUNKS: tl.constexpr, live):
    """Load the chunks of each row as columns: tiles (width, rows)."""
    tiles = ()
    for i in tl.static_range(len(CHUNKS)):
        column = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        tiles = tiles + (tl.load(rows[None, :] + column[:, None], mask=live[None, :], other=0.0),)
    return tiles


@triton.jit
def _store_across(rows, tiles, factor, CHUNKS: tl.constexpr, live):
    for i in tl.static_range(len(CHUNKS)):
        column = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        tile = (tiles[i] * factor[None, :]).to(rows.dtype.element_ty)
        tl.store(rows[None, :] + column[:, None], tile, mask=live[None, :])


@triton.jit(do_not_specialize=["queries", "heads_per_group", "capacity", "window", "lse_split", "lse_batch"])
def attend(
    Q, QRope, K, KRope, V, KScale, Lengths, Starts, Table, Out, Lse, scale,
    q_batch, q_token, q_head, qr_batch, qr_token, qr_head,
    k_batch, k_token, k_group, kr_batch, kr_token, v_batch, v_token, v_group,
    ks_batch, ks_token, table_batch,
    out_split, out_batch, out_token, out_head, lse_split, lse_batch, lse_token,
    queries, heads_per_group, capacity, window,
    HEAD: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, VALUE_IS_KEY: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of query rows to one split of the keys: normalized output and log-sum-exp.

    The grid is (splits, groups x row tiles, batch). A row is one (query token, head) pair of the group. Chunks are
    tuples of (start, power-of-two width); `scale` includes log2(e). With KScale, K is e4m3 and no chunk of HEAD
    crosses the border of a block.
    """
    split = tl.program_id(0)
    row_tiles = tl.cdiv(queries * heads_per_group, ROWS)
    group = tl.program_id(1) // row_tiles
    row = tl.program_id(1) % row_tiles * ROWS + tl.arange(0, ROWS)
    row_live = row < queries * heads_per_group
    token = row // heads_per_group
    head = group * heads_per_group + row % heads_per_group
    batch = tl.program_id(2).to(tl.int64)

    length = capacity if Lengths is None else tl.load(Lengths + batch)
    first = 0 if Starts is None else tl.load(Starts + batch)
    low = tl.maximum(first, length - queries - window + 1)
    span = tl.cdiv(tl.cdiv(tl.maximum(length - low, 0), tl.num_programs(0)), KEYS) * KEYS
    low += split * span
    high = tl.minimum(low + span, length)
    last = length - queries + token
    earliest = tl.maximum(first, last - window + 1)

    q = _columns_across(Q + batch * q_batch + token * q_token + head * q_head, HEAD, row_live)
    if len(ROPE) > 0:
        q_rope = _columns_across(QRope + batch * qr_batch + token * qr_token + head * qr_head, ROPE, row_live)
    K += group * k_group
    V += group * v_group
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over keys once, after the loop: a sum across warps in every step would need a barrier.
    weights = tl.zeros([KEYS, ROWS], tl.float32)
    out = ()
    for i in tl.static_range(len(VALUE)):
        out = out + (tl.zeros((tl.constexpr(VALUE[i][1]), ROWS), tl.float32),)

    for start in tl.range(low, high, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        live = key < high
        if PAGE == 0:
            block = batch
            slot = key
        else:
            block = tl.load(Table + batch * table_batch + key // PAGE, mask=live, other=0).to(tl.int64)
            slot = key % PAGE
        k_rows = K + block * k_batch + slot * k_token
        score = tl.zeros([KEYS, ROWS], tl.float32)
        if len(ROPE) > 0:
            rope_rows = KRope + block * kr_batch + slot * kr_token
            for i in tl.static_range(len(ROPE)):
                tile = _columns(rope_rows, tl.constexpr(ROPE[i][0]), tl.constexpr(ROPE[i][1]), live)
                score = tl.dot(tile, q_rope[i], score, input_precision="ieee")
        values = ()
        for i in tl.static_range(len(HEAD)):
            part = _columns(k_rows, tl.constexpr(HEAD[i][0]), tl.constexpr(HEAD[i][1]), live)
            if KScale is not None:
                scales = KScale + block * ks_batch + slot * ks_token + HEAD[i][0] // BLOCK
                factor = tl.load(scales, mask=live, other=0.0)
                part = (part.to(tl.float32) * factor[:, None]).to(Q.dtype.element_ty)
            score = tl.dot(part, q[i], score, input_precision="ieee")
            if VALUE_IS_KEY:
                values = values + (part,)
        if not VALUE_IS_KEY:
            v_rows = V + block * v_batch + slot * v_token
            for i in tl.static_range(len(VALUE)):
                values = values + (_columns(v_rows, tl.constexpr(VALUE[i][0]), tl.constexpr(VALUE[i][1]), live),)

        visible = (key[:, None] <= last[None, :]) & (key[:, None] >= earliest[None, :]) & live[:, None]
        score = tl.where(visible, score * scale, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 0))
        # The maximum of a row without a visible key so far is -inf, and -inf - -inf would be NaN.
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shrink = tl.exp2(maximum - finite)
        weight = tl.exp2(score - finite[None, :])
        weights = weights * shrink[None, :] + weight
        maximum = new_maximum
        probability = weight.to(Q.dtype.element_ty)
        grown = ()
        for i in tl.static_range(len(VALUE)):
            grown = grown + (
                tl.dot(tl.trans(values[i]), probability, out[i] * shrink[None, :], input_precision="ieee"),
            )
        out = grown

    total = tl.sum(weights, 0)
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    out_rows = Out + split.to(tl.int64) * out_split + batch * out_batch + token * out_token + head * out_head
    _store_across(out_rows, out, inverse, VALUE, row_live)
    lse_rows = Lse + split.to(tl.int64) * lse_split + batch * lse_batch + token * lse_token + head
    # Without keys the result is -inf, as the merge expects; ln 2 converts base 2 to base e.
    tl.store(lse_rows, (maximum + tl.log2(total)) * 0.6931471805599453, mask=row_live)


@triton.jit
def merge(
    Parts, PartLse, Out, Lse, splits, rows, width,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row: Parts (splits, rows, width) float32, PartLse (splits, rows) -> Out, Lse.

    The grid is (rows, ceil(width / WIDTH)), and SPLITS is at least splits: all loads of a program are in flight
    together. EARLY: the launch precedes the end of the kernel that writes Parts (Hopper).
    """
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    split = tl.arange(0, SPLITS)
    live = split < splits
    fits = column < width
    lse = tl.load(PartLse + split * rows + row, mask=live, other=float("-inf"))
    parts = tl.load(
        Parts + (split[:, None] * rows + row) * width + column[None, :],
        mask=live[:, None] & fits[None, :],
        other=0.0,
    )
    top = tl.max(lse, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(lse - finite)
    total = tl.sum(weight, 0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(Out + row * width + column, merged.to(Out.dtype.element_ty), mask=fits)
    tl.store(Lse + row, top + tl.log(total), mask=tl.program_id(1) == 0)
