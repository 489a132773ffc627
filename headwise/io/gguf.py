"""Read a GGUF file: its metadata and its table of tensors first, then one dequantised tensor at a time.

Every length and offset of the header is checked before it is used. Blocks are dequantised by the package `gguf`, a
few megabytes at a time. Its `GGUFReader` is not used: it maps the file, keeps several arrays for every token of the
vocabulary, and reports a damaged file by whatever error numpy raises. Format: https://github.com/ggml-org/ggml,
docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.format import dtype_name
from headwise.io.fs import os_errors
from headwise.io.gguf_config import (
    Placement,
    card_fields,
    config_from_metadata,
    find_gguf_row,
    generation_config,
    place_tensors,
)
from headwise.io.gguf_parser import HeaderParser, gguf_error
from headwise.io.gguf_tokenizer import write_tokenizer
from headwise.io.header import TensorEntry
from headwise.io.workdir import write_file_atomically

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, MAX_TENSORS = 32, 1_000_000
# Kinds of GGUF file that hold no language model, by general.type and by general.architecture.
NO_MODEL = {"mmproj": "an image or audio encoder (mmproj)", "adapter": "a LoRA adapter", "imatrix": "statistics"}
NO_MODEL |= {"clip": NO_MODEL["mmproj"]}
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Elements that are dequantised at once.
ELEMENTS = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """One tensor in a GGUF file.

    Attributes:
        name: in the file.
        kind: the quantisation type's number.
        shape: in the order of torch.
        file: name of the file.
        offset: of its first byte from the start of the file.
        block: elements in a block.
        block_bytes: bytes of a block.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    file: str
    offset: int
    block: int
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.block * self.block_bytes

    @property
    def kind_name(self) -> str:
        """The quantisation type's name, such as Q4_K."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.kind).name


@dataclass(frozen=True)
class GgufHeader:
    """The header of one GGUF file: its metadata, its tensors by name, and how many bytes it takes."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    nbytes: int


@dataclass(frozen=True)
class GgufModel:
    """A language model in a GGUF file or in the parts of a split one, with the names of a stock checkpoint.

    Attributes:
        path: the file, the first part of a split one.
        headers: by file name.
        config: config.json.
        tensors: of all parts, by their names in the file.
        placements: tensor of the stock class -> where it comes from.
        dtype: of all tensors: float32 where every matrix in the file is float32, bfloat16 otherwise.
    """

    path: Path
    headers: dict[str, GgufHeader]
    config: dict[str, Any]
    tensors: dict[str, GgufTensor]
    placements: dict[str, Placement]
    dtype: torch.dtype

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the file."""
        return self.headers[self.path.name].metadata

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """The stock class's tensors. `offset` is that of the block data."""
        sources = {name: self.tensors[where.source] for name, where in self.placements.items()}
        return {
            name: TensorEntry(name, self.dtype, tensor.shape, tensor.file, tensor.offset)
            for name, tensor in sources.items()
        }

    @property
    def notes(self) -> list[str]:
        """Lines of a plan about what is read."""
        kinds = Counter(self.tensors[where.source].kind_name for where in self.placements.values())
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return [
            f"The tensors of {self.path.name} ({listed}) are dequantised to {dtype_name(self.dtype)}.",
            "config.json and the files of the tokenizer are made from the metadata of the GGUF file.",
        ]

    def read(self, name: str, file: FileIO) -> Tensor:
        """Return one tensor of the stock class.

        Args:
            name: of the tensor.
            file: the open file that holds it, at the start of its data.
        """
        heads, shape = self.placements[name].interleaved_heads, self.entries[name].shape
        values = torch.empty(math.prod(shape), dtype=self.dtype)
        end = 0
        for block in self._values(name, file):
            values[end : end + block.numel()] = block
            end += block.numel()
        values = values.view(shape)
        return interleaved_to_halves(values, heads) if heads else values

    def chunks(self, name: str, file: FileIO) -> Iterator[Tensor]:
        """Yield the values of `read`, flat, a few megabytes at a time.

        Args:
            name: of the tensor in the stock class.
            file: the open file that holds it, at the start of its data.
        """
        if self.placements[name].interleaved_heads:
            yield from self.read(name, file).flatten().split(ELEMENTS)
        else:
            yield from self._values(name, file)

    def _values(self, name: str, file: FileIO) -> Iterator[Tensor]:
        """Yield the values of a tensor in the order of the file."""
        where = self.placements[name]
        for values in dequantised(self.tensors[where.source], file):
            if where.norm_offset:
                values = values - np.float32(where.norm_offset)
            yield torch.from_numpy(values).to(self.dtype)


def open_gguf(path: Path) -> GgufModel:
    """Read the headers of a GGUF file and of all its parts; no tensor of a layer is read.

    Args:
        path: the file, or any part of a split one.

    Raises:
        HeadwiseError: the file is damaged or incomplete, holds no language model, or one of an architecture or
            quantisation type that cannot be read.
    """
    paths = _find_parts(path)
    headers = {part.name: read_gguf_header(part) for part in paths}
    metadata = headers[paths[0].name].metadata
    _check_parts(paths, headers)
    _refuse_other_files(paths[0], metadata)
    row = find_gguf_row(metadata, paths[0])
    tensors: dict[str, GgufTensor] = {}
    for name, header in headers.items():
        for double in tensors.keys() & header.tensors.keys():
            raise gguf_error(name, f"tensor {double} is in {tensors[double].file} as well")
        tensors |= header.tensors
    if not tensors:
        raise HeadwiseError(f"{paths[0]} holds a vocabulary and no tensors.", "Name the GGUF file of the model.")
    tied = _has_tied_head(paths[0].parent, tensors)
    rope_factors = None
    if "rope_freqs.weight" in tensors:
        rope_factors = _read_whole(paths[0].parent, tensors["rope_freqs.weight"])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = config_from_metadata(metadata, shapes, row, paths[0], tied=tied, rope_factors=rope_factors)
    placements = place_tensors(shapes, row, config, paths[0])
    used = [tensors[where.source] for where in placements.values()]
    matrices = {tensor.kind for tensor in used if len(tensor.shape) > 1}
    dtype = torch.float32 if matrices == {0} else torch.bfloat16
    config["dtype"] = dtype_name(dtype)
    return GgufModel(paths[0], headers, config, tensors, placements, dtype)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of one file.

    Args:
        path: the file.

    Raises:
        HeadwiseError: it is no GGUF file, is damaged or truncated, or has a tensor of an unknown type.
    """
    with os_errors(path, "read"), open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        parser = HeaderParser(file, path.name, size)
        if size < 4 or file.read(4) != MAGIC:
            raise HeadwiseError(f"{path} is not a GGUF file: it does not begin with GGUF.", "Name a GGUF file.")
        version = parser.number("u4")
        if version not in VERSIONS:
            swapped = version.to_bytes(4, "little")[::-1] in [v.to_bytes(4, "little") for v in VERSIONS]
            kind = "big-endian" if swapped else f"of version {version}"
            raise HeadwiseError(f"{path} is a GGUF file {kind}.", "Versions 2 and 3, little-endian, can be read.")
        num_tensors, num_values = parser.number("u8"), parser.number("u8")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = parser.string("a metadata key")
            if not key.isprintable() or not key or key in metadata:
                raise gguf_error(path.name, f"metadata key {key!r} is not a name, or appears twice")
            metadata[key] = parser.value(parser.number("u4"), key)
        if num_tensors > MAX_TENSORS:
            raise gguf_error(path.name, f"its header declares {num_tensors} tensors")
        table = [parser.tensor() for _ in range(num_tensors)]
        return GgufHeader(metadata, _place_data(path.name, table, metadata, file.tell(), size), file.tell())


def write_model_files(model: GgufModel, folder: Path) -> None:
    """Write what a checkpoint holds beside its weights: configs, tokenizer, chat templates, licence.

    Args:
        model: the opened file.
        folder: where to write.

    Raises:
        HeadwiseError: the tokenizer cannot be rebuilt.
    """
    for name, content in (
        ("config.json", model.config),
        ("generation_config.json", generation_config(model.metadata, model.config)),
    ):
        write_file_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    write_tokenizer(model.metadata, folder, model.path, model.config["max_position_embeddings"])
    if card := card_fields(model.metadata):
        text = f"---\n{yaml.safe_dump(card, allow_unicode=True)}---\n"
        write_file_atomically(folder / "README.md", text.encode())


def header_hash(file: FileIO, header: GgufHeader) -> str:
    """Return the SHA-256 of a file's header.

    Args:
        file: the open file.
        header: gives its length.
    """
    file.seek(0)
    digest, left = hashlib.sha256(), header.nbytes
    while left and (content := file.read(min(left, ELEMENTS))):
        digest.update(content)
        left -= len(content)
    return digest.hexdigest()


def dequantised(tensor: GgufTensor, file: FileIO) -> Iterator[np.ndarray]:
    """Yield the values of a tensor, flat, in float32, about `ELEMENTS` at a time.

    Args:
        tensor: in the table of the file.
        file: the open file, at the start of the tensor's data.

    Raises:
        HeadwiseError: the file ends early.
    """
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.kind)
    step = max(1, ELEMENTS // tensor.block) * tensor.block_bytes
    for start in range(0, tensor.nbytes, step):
        content = bytearray(min(step, tensor.nbytes - start))
        _read_into(file, memoryview(content), tensor)
        # Values that are not finite are refused where they are written, by name.
        with np.errstate(all="ignore"):
            values = dequantize(np.frombuffer(content, dtype=np.uint8), kind).reshape(-1)
        yield values


def interleaved_to_halves(values: Tensor, heads: int) -> Tensor:
    """Return query or key rows in the order of checkpoints.

    A rotary plane's two rows are neighbours in the GGUF file, and half a head apart in the checkpoint.

    Args:
        values: (heads * head_dim, ...).
        heads: number of heads.
    """
    planes = values.unflatten(0, (heads, -1, 2))
    result: Tensor = planes.transpose(1, 2).reshape(values.shape)
    return result


def _place_data(
    file: str, table: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any], end: int, size: int
) -> dict[str, GgufTensor]:
    """Check that every tensor of the table lies in the file, and that no two overlap."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 8 <= alignment <= 1 << 20:
        raise gguf_error(file, f"general.alignment is {alignment!r}")
    start = -(-end // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise gguf_error(file, f"tensor {name} appears twice")
        block, block_bytes = _block_of(kind, name, file)
        if not shape or 0 in shape or shape[-1] % block or offset % alignment:
            raise gguf_error(file, f"tensor {name} has the shape {shape} and the offset {offset}")
        tensors[name] = GgufTensor(name, kind, shape, file, start + offset, block, block_bytes)
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise gguf_error(file, f"tensor {tensor.name} overlaps with another")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise gguf_error(file, f"it is truncated: tensor {tensor.name} ends at byte {end:,} of {size:,}")
    return tensors


def _block_of(kind: int, name: str, file: str) -> tuple[int, int]:
    if (known := _block_size(kind)) is None:
        from importlib.metadata import version

        raise HeadwiseError(
            f"Tensor {name} in {file} has the quantisation type {_kind_name(kind)}, which the package gguf "
            f"{version('gguf')} cannot dequantise.",
            "Upgrade gguf, or use a file of another quantisation type.",
        )
    return known


@lru_cache(maxsize=128)
def _block_size(kind: int) -> tuple[int, int] | None:
    """Elements and bytes of a block; None for a type that cannot be dequantised."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        dequantize(np.zeros(block_bytes, dtype=np.uint8), GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError):
        return None
    return block, block_bytes


def _kind_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return f"{GGMLQuantizationType(kind).name} ({kind})"
    except ValueError:
        return str(kind)


def _find_parts(path: Path) -> list[Path]:
    """Return the file, or all parts of a split one, by their names."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise HeadwiseError(
                f"{part} is missing: {path.name} is one of the {count} parts of a split GGUF file.",
                "Download all parts into one folder.",
            )
    return parts or [path]


def _check_parts(paths: list[Path], headers: dict[str, GgufHeader]) -> None:
    """Check what every part records about the split."""
    for number, path in enumerate(paths):
        metadata = headers[path.name].metadata
        count, own = metadata.get("split.count", 1), metadata.get("split.no", 0)
        if (count or 1) != len(paths) or own != number:
            raise HeadwiseError(
                f"{path} is part {own + 1 if isinstance(own, int) else own} of {count} by its split.no and "
                f"split.count, and part {number + 1} of {len(paths)} by its name.",
                "Restore the names of the parts, such as model-00001-of-00003.gguf.",
            )
    expected = headers[paths[0].name].metadata.get("split.tensors.count")
    present = sum(len(header.tensors) for header in headers.values())
    if isinstance(expected, int) and expected != present and len(paths) > 1:
        raise gguf_error(paths[0].name, f"split.tensors.count is {expected}, and its parts hold {present} tensors")


def _refuse_other_files(path: Path, metadata: dict[str, Any]) -> None:
    for key in ("general.type", "general.architecture"):
        value = metadata.get(key)
        if isinstance(value, str) and value in NO_MODEL:
            raise HeadwiseError(
                f"{path} holds {NO_MODEL[value]} and no language model: {key} is {value}.",
                "Name the GGUF file of the language model.",
            )


def _has_tied_head(folder: Path, tensors: dict[str, GgufTensor]) -> bool:
    """Whether the output head is absent, or has the very blocks of the embedding."""
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return True
    if (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return False
    pairs = zip(_blocks(folder, head), _blocks(folder, embedding), strict=True)
    return all(here == there for here, there in pairs)


def _blocks(folder: Path, tensor: GgufTensor) -> Iterator[bytes]:
    path = folder / tensor.file
    with os_errors(path, "read"), open(path, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.nbytes, ELEMENTS):
            content = bytearray(min(ELEMENTS, tensor.nbytes - start))
            _read_into(file, memoryview(content), tensor)
            yield bytes(content)


def _read_whole(folder: Path, tensor: GgufTensor) -> np.ndarray:
    path = folder / tensor.file
    with os_errors(path, "read"), open(path, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        return np.concatenate(list(dequantised(tensor, file)))


def _read_into(file: FileIO, left: memoryview, tensor: GgufTensor) -> None:
    with os_errors(Path(tensor.file), "read"):
        while left:
            count = file.readinto(left)
            if not count:
                raise gguf_error(tensor.file, f"it became shorter while tensor {tensor.name} was read")
            left = left[count:]
