"""Read a checkpoint: check all headers, which may be hostile, then read one tensor at a time.

Nothing in a checkpoint is executed. Tensors are read into their own memory, not through a memory map: headwise
forecasts the peak of resident memory, and mapped pages would count in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.fs import check_name, os_errors
from headwise.io.gguf import GgufModel, header_hash, open_gguf, write_model_files
from headwise.io.header import DTYPE_NAMES, MAX_HEADER, TensorEntry, header_error, parse_header
from headwise.io.quantized.powers import exponent_of, powers_of, times_power
from headwise.io.quantized.quantization import Quantization, find_quantized, plain_config
from headwise.io.source import Source, find_gguf, find_sidecars, find_source, path_inside
from headwise.progress import SILENT, Progress

CHUNK = 1 << 20
INTEGERS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}


@dataclass(frozen=True)
class FileState:
    """Size, time and header hash of a weight file, which show whether it changed since it was opened."""

    size: int
    mtime_ns: int
    header: str

    @classmethod
    def of(cls, file: FileIO, header: str) -> FileState:
        """Return the state of an open file.

        Args:
            file: the file.
            header: SHA-256 of its header.
        """
        status = os.fstat(file.fileno())
        return cls(status.st_size, status.st_mtime_ns, header)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are checked. Between two calls no file is open.

    Attributes:
        source: the user's name of it.
        folder: its files; for a GGUF file, a temporary folder with its config and tokenizer.
        revision: the commit of a Hub repository, else None.
        config: config.json.
        tensors: by name, in file order. `match_source` may give them other names than the files. For a GGUF file,
            those of the stock class, and for a quantised folder the plain weights, dequantised when they are read.
        sidecars: the files that a conversion copies byte for byte.
        left_out: names of the files that it does not copy.
        files: the state of every weight file.
        gguf: the GGUF file, or None.
        quantized: how the files of a folder are quantised; None if they are not. `config` has no such entry.
        powers: exponents of the powers of two that the files of a folder hold its modules with, by module name.
            `read` takes them back, and `config` has no such entry.
        notes: lines of a plan about how the checkpoint is read.
        warnings: lines of a plan about it that the user must not miss.
        dropped: tensors of the files that the stock class does not read.
        headless: whether it is a base model without a language-model head. Its config then ties a head to the
            embeddings, as the stock class needs one; the logits mean nothing.
    """

    source: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    sidecars: list[Path]
    left_out: list[str]
    files: dict[str, FileState]
    gguf: GgufModel | None = None
    quantized: Quantization | None = None
    powers: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: dict[str, TensorEntry] = field(default_factory=dict)
    headless: bool = False
    _pickled: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """Return the model's folder, or its GGUF file."""
        return self.gguf.path if self.gguf else self.folder

    @property
    def is_plain(self) -> bool:
        """Return whether the tensors are as the files hold them, so that stock transformers loads the same."""
        return self.gguf is None and self.quantized is None and not self.powers

    @property
    def in_memory(self) -> bool:
        """Return whether the weights were read as a whole, as those of .bin files are."""
        return bool(self._pickled)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors, as they are read."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Return the bytes of all tensors in the files of a folder."""
        return sum(entry.nbytes for entry in self.stored.values())

    @property
    def peak_bytes(self) -> int:
        """Return the bytes of memory that reading a quantised tensor takes at most; 0 if no tensor is quantised."""
        return max((t.peak_bytes for t in self.quantized.tensors.values()), default=0) if self.quantized else 0

    @property
    def num_parameters(self) -> int:
        """Return the number of elements of all tensors, from the headers."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    def read(self, name: str, *, pinned: bool = False) -> Tensor:
        """Read one tensor into its own memory, in the dtype of its entry.

        Args:
            name: of the tensor.
            pinned: read it into page-locked memory, which a GPU copies several times as fast. torch keeps such
                memory for later tensors, so that the system need not map new pages.

        Raises:
            HeadwiseError: the file changed since it was opened, or cannot be read.
        """
        entry = self.tensors[name]
        exponent = exponent_of(entry.name, self.powers)
        if self.gguf is None and self.quantized is None and not exponent:
            return self.read_stored(entry, pinned=pinned)
        tensor = times_power(self._read_encoded(name, entry), -exponent)
        return tensor.pin_memory() if pinned else tensor

    def _read_encoded(self, name: str, entry: TensorEntry) -> Tensor:
        if self.gguf:
            with self._open(entry) as file:
                return self.gguf.read(name, file)
        if self.quantized is None:
            return self.read_stored(entry)
        if (weight := self.quantized.tensors.get(entry.name)) is not None:
            return weight.read(self.read_stored)
        return self.read_stored(self.quantized.stored[entry.name]).to(entry.dtype)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """Return the tensors of the files, by their names there; of a GGUF file those of the stock class."""
        return self.quantized.stored if self.quantized else self.tensors

    def read_stored(self, entry: TensorEntry, *, pinned: bool = False) -> Tensor:
        """Read a tensor of a safetensors or pickle file as it is stored.

        Args:
            entry: of the tensor, by its name in the file.
            pinned: as in `read`.

        Raises:
            HeadwiseError: the file changed since it was opened, or cannot be read.
        """
        if entry.file in self._pickled:
            tensor = self._pickled[entry.file][entry.name]
            return tensor.pin_memory() if pinned else tensor.clone()
        flat = torch.empty(entry.nbytes, dtype=torch.uint8, pin_memory=pinned and entry.nbytes > 0)
        with self._open(entry) as file:
            self._fill(flat, file, entry)
        return flat.view(entry.dtype).view(entry.shape)

    def read_prefix(self, prefix: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read all tensors whose names start with a prefix.

        Args:
            prefix: such as "model.layers.3.self_attn.".
            device: of the tensors.

        Raises:
            HeadwiseError: see `read`.
        """
        return {name: self.read(name).to(device) for name in self.tensors if name.startswith(prefix)}

    def chunks(self, name: str, buffers: Sequence[Tensor]) -> Iterator[Tensor]:
        """Read one tensor in chunks of at most `CHUNK` bytes.

        Args:
            name: of the tensor.
            buffers: from `make_buffers`, filled in turn: a chunk is valid until `len(buffers)` chunks later.

        Yields:
            Flat uint8, whole elements in each chunk.

        Raises:
            HeadwiseError: the file changed since it was opened, or cannot be read.
        """
        entry = self.tensors[name]
        if self.gguf:
            with self._open(entry) as file:
                yield from map(as_bytes, self.gguf.chunks(name, file))
        elif exponent_of(entry.name, self.powers) or (
            self.quantized and self.quantized.stored.get(entry.name) != entry
        ):
            yield from as_bytes(self.read(name)).split(CHUNK)
        else:
            yield from self.stored_chunks(entry, buffers)

    def stored_chunks(self, entry: TensorEntry, buffers: Sequence[Tensor]) -> Iterator[Tensor]:
        """Read a tensor of a safetensors or pickle file as it is stored, in chunks of at most `CHUNK` bytes.

        Args:
            entry: of the tensor, by its name in the file.
            buffers: as in `chunks`.

        Yields:
            Flat uint8, whole elements in each chunk.

        Raises:
            HeadwiseError: the file changed since it was opened, or cannot be read.
        """
        if entry.file in self._pickled:
            yield from as_bytes(self._pickled[entry.file][entry.name]).split(CHUNK)
            return
        with self._open(entry) as file:
            for number, start in enumerate(range(0, entry.nbytes, CHUNK)):
                chunk = buffers[number % len(buffers)][: entry.nbytes - start]
                self._fill(chunk, file, entry)
                yield chunk

    def fingerprint(self) -> str:
        """Return the SHA-256 over config and every weight file's name, size, time and header."""
        states = {name: [s.size, s.mtime_ns, s.header] for name, s in self.files.items()}
        settings: list[Any] = [self.quantized.settings] if self.quantized else []
        settings += [self.powers] if self.powers else []
        return hashlib.sha256(json.dumps([self.config, states, *settings], sort_keys=True).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Check that no weight file changed since the checkpoint was opened.

        Raises:
            HeadwiseError: one did.
        """
        for name, state in self.files.items():
            with _opened(self._path(name)) as file:
                same = FileState.of(file, state.header) == state
                if not same or (name not in self._pickled and self._header_hash(file, name) != state.header):
                    raise self._changed(name)

    def _path(self, name: str) -> Path:
        return self.path.with_name(name) if self.gguf else self.folder / name

    def _header_hash(self, file: FileIO, name: str) -> str:
        return header_hash(file, self.gguf.headers[name]) if self.gguf else _read_header(file, name)[1]

    def _open(self, entry: TensorEntry) -> FileIO:
        file = _opened(self._path(entry.file))
        state = self.files[entry.file]
        if FileState.of(file, state.header) != state:
            file.close()
            raise self._changed(entry.file)
        file.seek(entry.offset)
        return file

    def _fill(self, flat: Tensor, file: FileIO, entry: TensorEntry) -> None:
        left = flat.numpy().data
        with os_errors(self.folder / entry.file, "read"):
            while left:
                count = file.readinto(left)
                if not count:
                    raise self._changed(entry.file)
                left = left[count:]

    def _changed(self, name: str) -> HeadwiseError:
        return HeadwiseError(
            f"{self._path(name)} changed while it was being read.",
            "Run it again when no other program writes to the source.",
        )


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_pickle: bool = False,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Open a local folder, a GGUF file or a Hub repository `org/name[@revision]`, and check every header.

    Args:
        model: the folder, file or repository.
        revision: branch, tag or commit of a repository.
        token: of the Hub.
        allow_pickle: read tensors from pickled weights (.bin), with torch's `weights_only`.
        progress: gets the bytes of a download.

    Raises:
        HeadwiseError: the source is missing, incomplete, inconsistent or pickled.
    """
    check_name(model)
    if (path := find_gguf(model, revision)) is not None:
        return read_gguf(path)
    source = find_source(model, revision=revision, token=token, allow_pickle=allow_pickle, progress=progress)
    return read_headers(source)


def read_headers(source: Source) -> Checkpoint:
    """Open a source and check its headers; no tensor is read.

    Args:
        source: the files.

    Raises:
        HeadwiseError: a header is not valid, a tensor is in two files, or the index is wrong.
    """
    files: dict[str, FileState] = {}
    tensors: dict[str, TensorEntry] = {}
    pickled: dict[str, dict[str, Tensor]] = {}
    for name in source.weights:
        path = path_inside(source.folder, name)
        if name.endswith(".bin"):
            pickled[name] = _load_pickle(path)
            entries = {k: TensorEntry(k, t.dtype, tuple(t.shape), name, 0) for k, t in pickled[name].items()}
            header = ",".join(entries)
            with _opened(path) as file:
                files[name] = FileState.of(file, hashlib.sha256(header.encode()).hexdigest())
        else:
            with _opened(path) as file:
                entries, header = _read_header(file, name)
                files[name] = FileState.of(file, header)
        for duplicate in tensors.keys() & entries.keys():
            raise HeadwiseError(f"Tensor {duplicate} is in both {tensors[duplicate].file} and {name}.")
        tensors |= entries
    for name, file_name in source.weight_map.items():
        if name not in tensors or tensors[name].file != file_name:
            raise HeadwiseError(
                f"The index of {source.folder} places tensor {name!r} in {file_name}, which does not contain it.",
                "Download the checkpoint again.",
            )
    checkpoint = Checkpoint(
        source=source.name,
        folder=source.folder,
        revision=source.revision,
        config=plain_config(source.config),
        tensors=tensors,
        sidecars=source.sidecars,
        left_out=source.left_out,
        files=files,
        powers=powers_of(source.config),
        _pickled=pickled,
    )
    quantized = find_quantized(source.name, source.config, tensors, checkpoint.read_stored)
    if quantized is None:
        return checkpoint
    return replace(checkpoint, tensors=quantized.entries, quantized=quantized, notes=[quantized.note])


def read_gguf(path: Path) -> Checkpoint:
    """Return the checkpoint in a GGUF file; no tensor of a layer is read.

    Args:
        path: the file, or any part of a split one.

    Raises:
        HeadwiseError: the file is damaged or incomplete, or holds no language model that can be read.
    """
    model = open_gguf(path)
    files = {}
    for name, header in model.headers.items():
        with _opened(path.with_name(name)) as file:
            files[name] = FileState.of(file, header_hash(file, header))
    temporary = tempfile.TemporaryDirectory(prefix="headwise-gguf-")
    folder = Path(temporary.name)
    with os_errors(folder):
        write_model_files(model, folder)
    return Checkpoint(
        source=str(path),
        folder=folder,
        revision=None,
        config=model.config,
        tensors=model.entries,
        sidecars=find_sidecars(folder, [])[0],
        left_out=[],
        files=files,
        gguf=model,
        notes=model.notes,
        _temporary=temporary,
    )


def make_buffers(count: int) -> list[Tensor]:
    """Allocate memory for `Checkpoint.chunks`; allocating for each chunk would take longer than the copy.

    Args:
        count: number of chunks that are valid at the same time.
    """
    return [torch.empty(CHUNK, dtype=torch.uint8) for _ in range(count)]


def has_nonfinite(values: Tensor) -> bool:
    """Return whether a tensor contains a NaN or an infinity.

    Read as signed integers, the bit patterns of positive floats have the order of the floats, and infinity and NaN
    are the largest; read as unsigned integers, the same holds for negative floats. Two maxima need no memory and
    are many times faster than `isfinite` on bfloat16, but on a GPU.

    Args:
        values: any dtype; integers are finite.
    """
    if not values.dtype.is_floating_point or values.numel() == 0:
        return False
    if values.dtype.itemsize == 1:
        values = values.float()
    if values.is_cuda:
        return not bool(values.isfinite().all())
    signed, unsigned = INTEGERS[values.dtype.itemsize]
    infinities = torch.tensor([float("inf"), float("-inf")], dtype=values.dtype)
    positive, negative = infinities.view(signed).numpy().view(unsigned)
    bits = values.detach().cpu().contiguous().view(signed).numpy()
    return bool(bits.max() >= positive or bits.view(unsigned).max() >= negative)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as flat uint8, without a copy if the tensor is contiguous.

    Args:
        tensor: on any device.
    """
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _read_header(file: FileIO, name: str) -> tuple[dict[str, TensorEntry], str]:
    with os_errors(Path(file.name), "read"):
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise header_error(name, f"it is truncated: {size} bytes do not hold the header")
    if length > MAX_HEADER:
        raise header_error(name, f"its header claims {length} bytes, more than the {MAX_HEADER} the format allows")
    with os_errors(Path(file.name), "read"):
        header = file.read(length)
    if len(header) != length:
        raise header_error(name, "it became shorter while it was being read")
    return parse_header(header, size - 8 - length, name), hashlib.sha256(header).hexdigest()


def _load_pickle(path: Path) -> dict[str, Tensor]:
    # With weights_only torch builds tensors only, and refuses everything that would run code.
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HeadwiseError(f"{path} cannot be read as plain tensors: {reason}") from None
    if not isinstance(state, dict) or not all(_is_plain(name, tensor) for name, tensor in state.items()):
        raise HeadwiseError(f"{path} is not a table of bfloat16, float16 or float32 tensors.")
    return {name: tensor.detach() for name, tensor in state.items()}


def _is_plain(name: Any, tensor: Any) -> bool:
    """Return whether an entry of a pickle is a named tensor whose elements are all in the file.

    A few bytes can also describe a tensor of any size: with a stride of zero, sparse, or without data.
    """
    return (
        isinstance(name, str)
        and name.isprintable()
        and name != ""
        and isinstance(tensor, Tensor)
        and tensor.dtype in DTYPE_NAMES
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _opened(path: Path) -> FileIO:
    with os_errors(path, "read"):
        return open(path, "rb", buffering=0)
