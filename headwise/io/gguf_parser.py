"""Parse the header of a GGUF file piece by piece. Every length and offset is checked before it is used."""

from __future__ import annotations

import struct
from io import BufferedReader
from typing import Any

import numpy as np

from headwise.errors import HeadwiseError
from headwise.io.header import MAX_HEADER

MAX_DIMENSIONS, MAX_STRINGS = 4, 4_000_000
# Type number -> name of numpy's dtype, for metadata of a fixed size.
NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9


class HeaderParser:
    """Read the pieces of a header, and refuse any that the file cannot hold.

    Args:
        file: the open file, at the start of its header.
        name: of the file, for messages.
        size: of the file, in bytes.
    """

    def __init__(self, file: BufferedReader, name: str, size: int) -> None:
        self.file, self.name, self._size, self._strings = file, name, size, 0

    def take(self, count: int, what: str) -> bytes:
        """Return the next bytes; `what` names them in messages."""
        end = self.file.tell() + count
        if end > MAX_HEADER:
            raise gguf_error(self.name, f"{what} lies beyond byte {MAX_HEADER:,}")
        if end > self._size or len(content := self.file.read(count)) != count:
            raise gguf_error(self.name, f"it is truncated in its header, at {what}")
        return content

    def number(self, kind: str, what: str = "a number") -> int:
        """Return a number of one of numpy's kinds."""
        dtype = np.dtype(kind).newbyteorder("<")
        return int(np.frombuffer(self.take(dtype.itemsize, what), dtype)[0])

    def string(self, what: str) -> str:
        """Return a string; `what` names it in messages."""
        self._strings += 1
        if self._strings > MAX_STRINGS:
            raise gguf_error(self.name, f"it has more than {MAX_STRINGS:,} strings")
        (length,) = struct.unpack("<Q", self.take(8, what))
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise gguf_error(self.name, f"{what} is not valid UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """Return the metadata value of a key."""
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            return self._array(self.number("u4", key), self.number("u8", key), key)
        return _plain(self._numbers(kind, 1, key)[0])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the name, shape, type and offset of one row of the table."""
        name = self.string("a tensor's name")
        if not name.isprintable() or not name:
            raise gguf_error(self.name, f"tensor name {name!r} is empty or has control characters")
        count = self.number("u4", name)
        if count > MAX_DIMENSIONS:
            raise gguf_error(self.name, f"tensor {name} has {count} dimensions")
        shape = tuple(self.number("u8", name) for _ in range(count))[::-1]
        return name, shape, self.number("u4", name), self.number("u8", name)

    def _array(self, kind: int, count: int, key: str) -> Any:
        if kind == STRING:
            return [self.string(key) for _ in range(count)]
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> Any:
        if kind not in NUMBERS:
            raise gguf_error(self.name, f"metadata {key} has the type {kind}, which the format does not have")
        dtype = np.dtype(NUMBERS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)


def _plain(value: Any) -> Any:
    """Return a metadata number as Python's; a float32 as its shortest decimal, such as 1e-05."""
    return float(str(value)) if value.dtype.itemsize == 4 and value.dtype.kind == "f" else value.item()


def gguf_error(file: str, reason: str) -> HeadwiseError:
    """Return the error of a damaged file.

    Args:
        file: its name.
        reason: what is wrong, without a full stop.
    """
    return HeadwiseError(f"{file} is not a sound GGUF file: {reason}.", "Download the file again.")
