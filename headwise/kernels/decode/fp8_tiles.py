"""Parts of the Hopper kernel on FP8 latents: queries in two parts, scores of blocks, and values in float16."""

# Gluon compiles a part of Python only: no starred tuples, no conditional expressions on None.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from headwise.kernels.decode import latent_fp8
from headwise.kernels.decode.fp8_copies import BLOCK, _block
from headwise.kernels.decode.hopper import _add_scores

LARGEST = gl.constexpr(latent_fp8.LARGEST)
PAIRS = gl.constexpr(latent_fp8.BLOCK // 2)
# A rotary part of a query that is larger than this many times the rest decides the unit: 448 times it is a float16.
ROTARY = gl.constexpr(128.0)


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
def _log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _inverse(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _leaves_float16(largest):
    """Return 1 in every thread of a warp in which a thread has a number above 2^15, or NaN."""
    return gl.inline_asm_elementwise(
        """
        {
            .reg .pred mine, any;
            setp.gtu.f32 mine, $1, 0f47000000;
            vote.sync.any.pred any, mine, 0xffffffff;
            selp.b32 $0, 1, 0, any;
        }
        """,
        "=r,f",
        [largest],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
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
    both, q_rope, units = queries
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
    # A power of two, rounded up: the rotary part stays exact.
    bits = (gl.where(largest > 0, largest, 1.0) / LARGEST).to(gl.int32, bitcast=True)
    unit = ((bits + 0x7FFFFF) & 0x7F800000).to(gl.float32, bitcast=True)
    units.store(unit)
    for i in gl.static_range(BLOCKS):
        q = _load_queries(rows, live, i * BLOCK + column, copy) / unit[:, None]
        first = q.to(gl.float8e4nv)
        both.index(i).slice(0, ROWS).store(first)
        both.index(i).slice(ROWS, ROWS).store((q - first.to(gl.float32)).to(gl.float8e4nv))
    for i in gl.static_range(len(ROPE)):
        rope_column = ROPE[i][0] + gl.arange(0, ROPE[i][1], gl.SliceLayout(0, copy))
        q = _load_queries(rope_rows, live, rope_column, copy) / unit[:, None]
        q_rope[i].store(q.to(q_rope[i].dtype))


@gluon.jit
def _of_threads(tile):
    """View a tile (keys, rows) of products as (warps, 2, 8, rows / 8, 4, 2): a thread holds axes 1, 3 and 5."""
    return tile.reshape([tile.shape[0] // 16, 2, 8, tile.shape[1] // 8, 4, 2])


@gluon.jit
def _sum_in_thread(weight):
    """Return the sums of a tile (keys, rows) over the pairs of keys that a thread holds: (warps, 8, rows)."""
    return gl.sum(weight.reshape([weight.shape[0] // 16, 2, 8, weight.shape[1]]), 1)


@gluon.jit
def _start_block(
    k_rings, stage, both, zero, i: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr
):  # fmt: skip
    """Start the products of a block's keys with both parts of the queries: (keys, 2 rows). `zero` is 0."""
    mma_fp8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 2 * ROWS, 32])
    empty = gl.zeros([KEYS, 2 * ROWS], gl.float32, mma_fp8)
    keys = _block(k_rings, stage, i, BLOCKS)
    return warpgroup_mma(keys, both.index(i + zero).permute((1, 0)), empty, is_async=True)


@gluon.jit
def _add_block(score, part, scale):
    """Add the products (keys, 2 rows) of a block to the scores (keys, rows), times its scales (keys)."""
    part = gl.sum(part.reshape([score.shape[0], 2, score.shape[1]]), 1)
    return score + gl.convert_layout(part, score.type.layout, assert_trivial=True) * scale[:, None]


@gluon.jit
def _scores(
    k_rings, rope_ring, stage, both, q_rope, zero, scales,
    ROPE: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, FLIGHT: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """Return the scores (keys, rows) of one tile, in units of the queries; FLIGHT blocks are in flight."""
    score = gl.zeros([KEYS, ROWS], gl.float32, mma)
    if len(ROPE) > 0:
        score = _add_scores(score, rope_ring, stage, q_rope, ROPE)
    parts = ()
    for i in gl.static_range(FLIGHT - 1):
        if i < BLOCKS:
            parts = parts + (_start_block(k_rings, stage, both, zero, i, BLOCKS, ROWS, KEYS),)
    for i in gl.static_range(BLOCKS):
        if i + FLIGHT - 1 < BLOCKS:
            parts = parts + (_start_block(k_rings, stage, both, zero, i + FLIGHT - 1, BLOCKS, ROWS, KEYS),)
        score, part = warpgroup_mma_wait(min(FLIGHT - 1, BLOCKS - 1 - i), deps=(score, parts[i]))
        score = _add_block(score, part, scales[i])
    return score


@gluon.jit
def _values(pair_tile, shares, at: gl.constexpr, STEP: gl.constexpr, operand: gl.constexpr):
    """Return the even and the odd columns (128, STEP) of a pair of blocks, for the keys from `at` on."""
    even, odd = _expand(pair_tile.slice(at, STEP).permute((1, 0)).load(operand))
    even = even.reshape([2, PAIRS, STEP])
    odd = odd.reshape([2, PAIRS, STEP])
    share = shares.slice(at, STEP, 1).load(gl.SliceLayout(1, even.type.layout))
    even = gl.convert_layout((even * share[:, None, :]).reshape([BLOCK, STEP]), operand, assert_trivial=True)
    odd = gl.convert_layout((odd * share[:, None, :]).reshape([BLOCK, STEP]), operand, assert_trivial=True)
    return even, odd


@gluon.jit
def _rest_values(pair_tile, shares, at: gl.constexpr, STEP: gl.constexpr, operand: gl.constexpr):
    """Return the even and the odd columns (64, STEP) of one block, for the keys from `at` on."""
    even, odd = _expand(pair_tile.slice(at, STEP).permute((1, 0)).load(operand))
    share = shares.slice(at, STEP).load(gl.SliceLayout(0, operand))
    return even * share[None, :], odd * share[None, :]


@gluon.constexpr_function
def _quads(KEYS):
    """Return the layout of (keys, 4) whose threads hold the keys of the rows of a product."""
    warp_bases = [[16 << i, 0] for i in range((KEYS // 16).bit_length() - 1)]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, warp_bases, [], [KEYS, 4])


@gluon.jit
def _scales(
    scale_ring, stage, BLOCKS: gl.constexpr, KEYS: gl.constexpr, QUAD: gl.constexpr, by_key: gl.constexpr
):  # fmt: skip
    """Return the scales (keys) of each block of a tile."""
    scales = ()
    if QUAD:
        even, odd = gl.split(scale_ring.index(stage).load(_quads(KEYS)).reshape([KEYS, 2, 2]))
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        four = (first, second, third, fourth)
        for i in gl.static_range(BLOCKS):
            scales = scales + (gl.convert_layout(four[i], by_key, assert_trivial=True),)
    else:
        for i in gl.static_range(BLOCKS):
            scales = scales + (scale_ring.index(stage * BLOCKS + i).load(by_key),)
    return scales


@gluon.constexpr_function
def _mma_rest(warps, ROWS):
    """Return the layout of 64 columns and ROWS rows: eight warps divide both."""
    return gl.NVMMADistributedLayout([3, 0], [4, warps // 4], [16, ROWS // (warps // 4), 16])
