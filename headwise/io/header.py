"""Parse the header of a safetensors file, which may be hostile, and make one.

A file is eight bytes of header length (little endian), the header in JSON, and the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headwise.errors import HeadwiseError

# The dtypes that can be read, by their names in the safetensors format.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The bound of the reference implementation of the format.
MAX_HEADER = 100_000_000
SMALL_JSON = 1_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where the bytes of one tensor are: `offset` bytes from the start of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(header: bytes, data: int, file: str) -> dict[str, TensorEntry]:
    """Check the JSON header of a safetensors file as the format's specification demands.

    Args:
        header: the JSON, without the eight bytes of its length.
        data: number of bytes behind the header.
        file: the file's name, for entries and messages.

    Returns:
        The tensors in file order. Their ranges cover `data` without gap or overlap.

    Raises:
        HeadwiseError: the header is not valid, or does not match `data`.
    """
    try:
        refuse_dense_json(header)
        table = json.loads(header.decode(), object_pairs_hook=_unique)
        if not isinstance(table, dict):
            raise ValueError("it is not an object")
        table.pop("__metadata__", None)
        ranges = sorted((_entry(name, row, file, 8 + len(header)) for name, row in table.items()), key=_place)
    except (ValueError, RecursionError) as error:
        raise header_error(file, f"its header is not valid: {error}") from None
    end = 8 + len(header)
    for entry in ranges:
        if entry.offset != end:
            raise header_error(file, f"tensor {entry.name} starts at byte {entry.offset} instead of {end}")
        end += entry.nbytes
    described = end - 8 - len(header)
    if described > data:
        raise header_error(file, f"it is truncated: {described} bytes of data are expected, and it has {data}")
    if described < data:
        raise header_error(file, f"{data - described} bytes belong to no tensor")
    return {entry.name: entry for entry in ranges}


def make_header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return the length and the header of a file with these tensors one after the other.

    Spaces at the end make the data start at a multiple of eight bytes, which readers with a memory map need.

    Args:
        tensors: name, dtype and shape of each.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def refuse_dense_json(text: bytes) -> None:
    """Refuse large JSON that consists mostly of brackets and commas, before it is parsed.

    An empty list takes three bytes in a file and sixty in memory. Tables of tensors have names and shapes: at most
    one bracket in sixteen bytes, and one comma in six.

    Args:
        text: the JSON.

    Raises:
        ValueError: it is such JSON.
    """
    brackets, commas = text.count(b"[") + text.count(b"{"), text.count(b",")
    if len(text) > SMALL_JSON and (10 * brackets > len(text) or 4 * commas > len(text)):
        raise ValueError("it has more brackets and commas than names and numbers")


def _entry(name: str, row: Any, file: str, start: int) -> TensorEntry:
    if not name.isprintable() or not name:
        raise ValueError(f"tensor name {name!r} has control characters")
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} must have dtype, shape and data_offsets")
    if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
        raise HeadwiseError(
            f"Tensor {name} in {file} has dtype {row['dtype']!r}, which cannot be converted.",
            "Convert the model's bfloat16, float16 or float32 weights instead.",
        )
    shape, offsets = row["shape"], row["data_offsets"]
    if not (_whole(shape) and _whole(offsets) and len(offsets) == 2 and len(shape) <= 8):
        raise ValueError(f"tensor {name} has shape {shape!r} and data_offsets {offsets!r}")
    entry = TensorEntry(name, DTYPES[row["dtype"]], tuple(shape), file, start + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"tensor {name} has {offsets[1] - offsets[0]} bytes, "
            f"shape {list(shape)} of {row['dtype']} needs {entry.nbytes}"
        )
    return entry


def _place(entry: TensorEntry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name!r} appears twice")
        table[name] = value
    return table


def header_error(file: str, reason: str) -> HeadwiseError:
    """Make the error for a file whose header is not valid.

    Args:
        file: its name.
        reason: what is wrong, without a full stop.
    """
    return HeadwiseError(f"{file} is not a valid safetensors file: {reason}.", "Download the file again.")
