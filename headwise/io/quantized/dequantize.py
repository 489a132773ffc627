"""Compute plain weights from quantised ones, with the arithmetic of the stock loaders.

Every function takes the tensors of one weight by their roles and returns the weight as its loader does, before the
loader's last cast. The order of the operations and their dtypes are those of the loader, so that the results are
equal bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# The values of four-bit floats with two exponent bits and one mantissa bit, by their codes.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# The order of the eight columns that AWQ packs into one word.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# bitsandbytes multiplies by this in place of a division by 127.
INVERSE_127 = 7.874015718698502e-3


def blocks_to_plain(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return codes times the scale of their block: block FP8 of DeepSeek and Qwen3.

    Args:
        codes: (..., rows, columns) float8.
        scale: (..., ceil(rows / block rows), ceil(columns / block columns)), or one element.
        block: rows and columns of a block.

    Returns:
        float32; bfloat16 for several matrices.
    """
    if codes.dim() > 2:  # one matrix at a time: the products of all take many times the memory of the file
        many = (
            scale.expand(codes.shape[0], *scale.shape[1:]) if scale.dim() == codes.dim() else [scale] * len(codes)
        )
        return torch.stack([blocks_to_plain(c, s, block).bfloat16() for c, s in zip(codes, many, strict=True)])
    rows, columns = codes.shape
    each = _exponents(scale).reshape(1, 1) if scale.numel() == 1 else _exponents(scale)
    each = each.repeat_interleave(block[0], 0)[:rows]
    return codes.float() * each.repeat_interleave(block[1], 1)[:, :columns]


def _exponents(scale: Tensor) -> Tensor:
    """Return scales as float32; bytes are exponents of two with a bias of 127."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def rows_to_plain(codes: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int] | None) -> Tensor:
    """Return codes times the scale of their tensor, row, group of columns or block: compressed-tensors.

    Args:
        codes: (rows, columns) float8 or int8.
        scale: (rows, groups), (rows, 1), one element, or one for each block.
        zero: zero points of the shape of `scale`, or None.
        block: rows and columns of a block, where a scale has blocks.

    Returns:
        The dtype of `scale`, in which compressed-tensors computes.
    """
    values = codes.to(scale.dtype)

    def spread(each: Tensor) -> Tensor:
        if each.numel() == 1:
            return each.reshape(1, 1)
        if block is not None:
            each = each.repeat_interleave(block[0], 0)[: codes.shape[0]]
            return each.repeat_interleave(block[1], 1)[:, : codes.shape[1]]
        each = each.reshape(codes.shape[0], -1)
        return each.repeat_interleave(-(-codes.shape[1] // each.shape[1]), 1)[:, : codes.shape[1]]

    if zero is not None:
        values = values - spread(zero.to(scale.dtype))
    return values * spread(scale)


def packed_to_plain(
    packed: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, int], bits: int
) -> Tensor:
    """Return packed integers times the scale of their group of columns: `pack-quantized` of compressed-tensors.

    Args:
        packed: (rows, words) int32; an integer is stored with an offset of half its range.
        scale: (rows, groups).
        zero: (words, groups) packed zero points, or None.
        shape: of the weight.
        bits: of an integer, 4 or 8.
    """
    half = 1 << (bits - 1)
    codes = _unpacked(packed, bits)[:, : shape[1]] - half
    if zero is not None:
        zero = _unpacked(zero.T, bits).T[: shape[0]] - half
    return rows_to_plain(codes, scale, zero, None)


def gptq_to_plain(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bits: int, offset: bool) -> Tensor:
    """Return the weight of GPTQ, `scale * (code - zero)`, in the dtype of the scales.

    Args:
        codes: (inputs * bits / 32, outputs) int32, packed along the inputs.
        zeros: (groups, outputs * bits / 32) int32, packed along the outputs.
        scales: (groups, outputs).
        groups: (inputs,) the group of every input.
        bits: of a code, 2, 4 or 8.
        offset: whether zero points are stored less one, as the first version of the format does.

    Returns:
        (outputs, inputs).

    Raises:
        ValueError: an input is in a group that does not exist.
    """
    if offset:  # added to whole words, as the loader does: a zero point of all ones carries into the next one
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = (zeros.to(torch.int64) + ones).to(torch.int32)
    weight = _unpacked(codes.T, bits).T[: len(groups)]
    zero = _unpacked(zeros, bits)[:, : scales.shape[1]]
    index = groups.long()
    outside = index[(index < 0) | (index >= len(scales))]
    if outside.numel():
        raise ValueError(f"g_idx names group {int(outside[0])}, and the groups are 0 to {len(scales) - 1}")
    plain: Tensor = scales[index] * (weight - zero[index])
    return plain.T


def awq_to_plain(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Return the weight of AWQ (`gemm`, four bits), `(code - zero) * scale`, in the dtype of the scales.

    Args:
        codes: (inputs, outputs / 8) int32, packed along the outputs.
        zeros: (groups, outputs / 8) int32, packed likewise.
        scales: (groups, outputs).

    Returns:
        (outputs, inputs).
    """
    size = codes.shape[0] // scales.shape[0]

    def columns(words: Tensor) -> Tensor:
        ordered: Tensor = _unpacked(words, 4).unflatten(1, (-1, 8))[..., AWQ_ORDER]
        return ordered.flatten(1)

    difference = columns(codes) - columns(zeros).repeat_interleave(size, 0)
    plain: Tensor = difference * scales.repeat_interleave(size, 0)
    return plain.T


def mxfp4_to_plain(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the experts of gpt-oss from four-bit floats and one exponent of two for every 32 of them.

    Args:
        blocks: (experts, outputs, groups, 16) uint8, two codes each, the low half first.
        scales: (experts, outputs, groups) uint8, exponents with a bias of 127.

    Returns:
        (experts, inputs, outputs) bfloat16, in which the loader computes.
    """
    table = torch.tensor(E2M1, dtype=torch.bfloat16)
    result = torch.empty(blocks.shape[0], 32 * blocks.shape[2], blocks.shape[1], dtype=torch.bfloat16)
    for expert in range(blocks.shape[0]):  # one at a time: the codes take many times the memory of the file
        halves = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], -1).flatten(-2).int()
        values = torch.ldexp(table[halves], scales[expert].int()[..., None] - 127)
        result[expert] = values.flatten(-2).T
    return result


def int8_to_plain(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the weight of `LLM.int8` of bitsandbytes, float32.

    Args:
        codes: (outputs, inputs) int8.
        scale: (outputs,) the largest magnitude of every row.
    """
    return codes * scale.view(-1, 1) * INVERSE_127


def four_bits_to_plain(codes: Tensor, parts: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tensor:
    """Return the weight of nf4 or fp4 of bitsandbytes, in the dtype that it had before it was quantised.

    Args:
        codes: uint8, two codes each, the high half first.
        parts: `absmax` and `table`; with double quantisation also `nested_absmax` and `nested_table`.
        record: from `four_bit_record`.
    """
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        scales = _by_block(parts["nested_table"][absmax.long()], parts["nested_absmax"], record["nested_blocksize"])
        absmax = scales + torch.tensor(record["nested_offset"], dtype=torch.float32)
    flat = codes.view(torch.uint8).flatten()
    values = parts["table"][torch.stack([flat >> 4, flat & 15], -1).flatten().int()]
    shape = record["shape"]
    values = _by_block(values[: math.prod(shape)], absmax.float(), record["blocksize"])
    plain: Tensor = values.view(shape).to(getattr(torch, record["dtype"]))
    return plain


def four_bit_record(record: Tensor) -> dict[str, Any]:
    """Return the checked record of a weight of bitsandbytes in four bits.

    Args:
        record: the JSON text, uint8.

    Raises:
        ValueError: it is no such record.
    """
    fields = json.loads(bytes(record.tolist()).decode())
    if not isinstance(fields, dict):
        raise ValueError("it is not an object")
    shape, dtype = fields.get("shape"), fields.get("dtype")
    whole = isinstance(shape, list) and 0 < len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape)
    sizes = [fields.get("blocksize"), fields.get("nested_blocksize", 1)]
    if not whole or dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"its shape is {shape!r} and its dtype {dtype!r}")
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"its block sizes are {sizes}")
    if not isinstance(fields.get("nested_offset", 0.0), int | float):
        raise ValueError(f"its nested_offset is {fields['nested_offset']!r}")
    return fields


def _by_block(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Return flat values times the scale of their block of `size` elements."""
    return values * scales.repeat_interleave(size)[: len(values)]


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned integers in int32 words (rows, words), the lowest bits first: (rows, integers) int16."""
    octets = words.contiguous().view(torch.uint8)
    parts = [(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(1).short()
