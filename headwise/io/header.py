"""The header of a safetensors file: read as if a stranger had made it, and written.

A file is eight bytes of header length (little endian), the header in JSON, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headwise.errors import HeadwiseError

# The names that the safetensors format has for the dtypes a tensor may keep through a conversion.
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
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The bound of the reference implementation of the format.
MAX_HEADER = 100_000_000
SMALL_JSON = 1_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: where its bytes lie. `offset` counts from the start of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(header: bytes, data: int, file: str) -> dict[str, TensorEntry]:
    """Check the JSON header of a safetensors file as the format's specification demands.

    Args:
        header: the JSON, without the eight bytes of its length.
        data: how many bytes follow it.
        file: the file's name, for entries and messages.

    Returns:
        The tensors in file order. Their ranges cover `data` without gap or overlap.

    Raises:
        HeadwiseError: anything else.
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
    promised = end - 8 - len(header)
    if promised > data:
        raise header_error(file, f"it is truncated: its header promises {promised} bytes of data, {data} are there")
    if promised < data:
        raise header_error(file, f"{data - promised} bytes belong to no tensor")
    return {entry.name: entry for entry in ranges}


def make_header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The length and header of a file that holds these tensors one after the other.

    Padded with spaces so that the data starts at a multiple of eight bytes, as readers that map it expect.
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
    """Raise ValueError for large JSON of little but brackets and commas.

    An empty list takes three bytes in a file and sixty in memory. Tensors need names and shapes: their tables have
    a bracket in sixteen bytes at most, and a comma in six.
    """
    brackets, commas = text.count(b"[") + text.count(b"{"), text.count(b",")
    if len(text) > SMALL_JSON and (10 * brackets > len(text) or 4 * commas > len(text)):
        raise ValueError("it is made of more brackets and commas than of names and numbers")


def _entry(name: str, row: Any, file: str, start: int) -> TensorEntry:
    if not name.isprintable() or not name:
        raise ValueError(f"tensor name {name!r} has control characters")
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} needs dtype, shape and data_offsets")
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
    return HeadwiseError(f"{file} is not a sound safetensors file: {reason}.", "Download the file again.")
