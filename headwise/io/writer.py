"""Write a checkpoint so that it is there whole or not at all.

Everything happens in a work folder beside OUT, `.OUT.headwise-work`, which holds the growing output, a lock
and a journal. Every tensor's place is known before the first byte, so tensors may arrive in any order and a
resumed run writes the same bytes as an uninterrupted one. One rename publishes the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.format import parse_bytes
from headwise.io.fs import os_errors, sync, write_all
from headwise.io.header import make_header
from headwise.io.quantized.fp8 import quantize_blocks
from headwise.io.quantized.powers import as_stored
from headwise.io.reader import CHUNK, Checkpoint, as_bytes, has_nonfinite, make_buffers
from headwise.io.workdir import WorkFolder


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that the output will hold.

    Attributes:
        name: of the tensor.
        dtype: of its values.
        shape: of its values.
        source: the tensor it is a copy of; None if it is computed.
        stored: the tensors of the files that hold it, in the order of writing, if it is not stored as it is: the
            source's own, by their names in its files, or the scales and the codes of block FP8.
        exponent: of the power of two that its values are stored with.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str | None = None
    stored: tuple[OutputTensor, ...] = ()
    exponent: int = 0

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in the files in bytes."""
        if self.stored:
            return sum(tensor.nbytes for tensor in self.stored)
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One weight file of the output: its name, its header and its tensors in file order."""

    file: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def offsets(self) -> dict[str, int]:
        """Return where each tensor starts, counted from the start of the file."""
        places, end = {}, len(self.header)
        for tensor in self.tensors:
            places[tensor.name] = end
            end += tensor.nbytes
        return places


def refuse_nonfinite(name: str, values: Tensor) -> None:
    """Refuse a tensor that holds a NaN or an infinity.

    Args:
        name: of the tensor.
        values: all of it, or a part.

    Raises:
        HeadwiseError: it does.
    """
    if has_nonfinite(values):
        raise HeadwiseError(
            f"Tensor {name} holds NaN or infinite values.",
            "Pass `allow_nan` to convert the model all the same.",
        )


def plan_shards(tensors: Sequence[OutputTensor], max_shard_size: int | str = "5GB") -> list[Shard]:
    """Cut a list of tensors, as they are stored, into files of at most `max_shard_size` bytes of tensor data.

    huggingface_hub chooses the files. A tensor above this has a file to itself. Within a file wider dtypes come
    first, so that every tensor starts at a multiple of its own item size.

    Args:
        tensors: in the order of the output.
        max_shard_size: bytes, or a size such as "5GB".
    """
    by_name = {stored.name: stored for tensor in tensors for stored in tensor.stored or (tensor,)}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_bytes(max_shard_size),
    )
    shards = []
    for file, names in split.filename_to_tensors.items():
        group = sorted((by_name[name] for name in names), key=lambda tensor: -tensor.dtype.itemsize)
        header = make_header([(t.name, t.dtype, t.shape) for t in group])
        shards.append(Shard(file, header, tuple(group)))
    return shards


def unfinished_identity(out: str | Path) -> dict[str, Any]:
    """Return what the unfinished work on a folder is a function of; empty without such work.

    Args:
        out: the folder that would be published.
    """
    path = WorkFolder(out).folder / "journal.jsonl"
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        first = json.loads(path.read_bytes().partition(b"\n")[0])
    except (OSError, ValueError):
        return {}
    identity = first.get("identity") if isinstance(first, dict) else None
    return identity if isinstance(identity, dict) else {}


class Writer:
    """Write the planned tensors and files of one output folder.

    One thread may `copy` tensors while another one writes. Use it as a context manager. Leaving it after an
    interruption or a failing disk keeps the work for `resume`; leaving it after a HeadwiseError (the input is at
    fault) removes it.

    Args:
        out: the folder to make.
        tensors: all its tensors, in the order of the files.
        identity: what the output is a function of: source fingerprint, arguments, seed, versions. Resuming is
            refused if it differs, by the names of the entries that do.
        resume: continue an interrupted run if there is one.
        force: replace an existing model folder, once the new one is complete.
        allow_nan: write tensors that hold a NaN or an infinity.
        source: the source's folder, which must not overlap with `out`.

    Raises:
        HeadwiseError: `out` exists or is being written, the disk is too small, or the run cannot be resumed.
    """

    def __init__(
        self,
        out: str | Path,
        tensors: Sequence[OutputTensor],
        *,
        identity: dict[str, Any],
        source: Path | None = None,
        max_shard_size: int | str = "5GB",
        resume: bool = False,
        force: bool = False,
        allow_nan: bool = False,
    ) -> None:
        self.shards = plan_shards(tensors, max_shard_size)
        self.allow_nan = allow_nan
        # SHA-256 of every tensor written so far.
        self.hashes: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        self._planned = {tensor.name: tensor for tensor in tensors}
        self._tensors = {t.name: (t, shard) for shard in self.shards for t in shard.tensors}
        if len(self._tensors) != sum(len(tensor.stored) or 1 for tensor in tensors):
            raise ValueError("two output tensors have the same name")
        self._offsets = {shard.file: shard.offsets() for shard in self.shards}
        self._left = {shard.file: len(shard.tensors) for shard in self.shards}
        self._synced: list[Future[None]] = []
        self._journal = Lock()
        digest = hashlib.sha256(b"".join(shard.header for shard in self.shards)).hexdigest()
        self.work = WorkFolder(out, source=source, resume=resume, force=force)
        self.work.start({**identity, "tensors": digest}, sum(shard.nbytes for shard in self.shards))
        # One thread hashes while this one reads and writes: SHA-256 alone would halve the speed of a copy.
        self._buffers = make_buffers(3)
        self._hasher = ThreadPoolExecutor(1, "sha256")
        self._syncer = ThreadPoolExecutor(1, "fsync")
        try:
            with os_errors(self.work.out):
                self._restore()
        except BaseException as error:
            self.__exit__(None, error, None)
            raise

    @property
    def folder(self) -> Path:
        """Return the folder of the unpublished output, which is checked before it is published."""
        return self.work.output

    @property
    def done(self) -> set[str]:
        """Return the names of the planned tensors that are written."""
        written = self.hashes.keys()
        return {n for n, t in self._planned.items() if all(s.name in written for s in t.stored or (t,))}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Args:
            name: of the tensor.
            tensor: its values, with the planned dtype and shape.

        Raises:
            ValueError: the dtype or the shape is not the planned one.
            HeadwiseError: the tensor holds a NaN or an infinity, or the disk fails.
        """
        planned = self._planned[name]
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {planned}")
        if not planned.stored:
            self._stream(name, as_bytes(as_stored(name, tensor, planned.exponent)).split(CHUNK))
            return
        if not self.allow_nan:
            refuse_nonfinite(name, tensor)
        scale, codes = planned.stored
        for stored, values in zip((codes, scale), quantize_blocks(tensor), strict=True):
            self._stream(stored.name, as_bytes(values).split(CHUNK))

    def write_chunks(self, name: str, chunks: Iterable[Tensor]) -> None:
        """Write one tensor that is computed chunk by chunk.

        Args:
            name: of the tensor.
            chunks: its values in order, flat, with the planned dtype; each has memory of its own.

        Raises:
            ValueError: the dtype or the number of values is not the planned one.
            HeadwiseError: the tensor holds a NaN or an infinity, or the disk fails.
        """
        planned = self._planned[name]
        if planned.stored or planned.exponent:  # blocks of rows share a scale
            self.write(name, torch.cat(list(chunks)).view(planned.shape))
            return

        def checked() -> Iterator[Tensor]:
            left = math.prod(planned.shape)
            for chunk in chunks:
                left -= len(chunk)
                if chunk.dtype != planned.dtype or left < 0:
                    raise ValueError(f"{name} has {chunk.dtype} or too many values, planned was {planned}")
                yield as_bytes(chunk)
            if left:
                raise ValueError(f"{name} lacks {left} values, planned was {planned}")

        self._stream(name, checked())

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """Write a tensor again that is written already, such as one that was trained since.

        Args:
            name: of the tensor.
            tensor: its new values.

        Raises:
            ValueError: the dtype or the shape is not the planned one.
            HeadwiseError: the tensor holds a NaN or an infinity, or the disk fails.
        """
        for stored in self._planned[name].stored or (self._planned[name],):
            self._left[self._tensors[stored.name][1].file] += 1
        self.write(name, tensor)

    def copy(self, name: str, checkpoint: Checkpoint) -> None:
        """Copy one tensor from its source in a checkpoint, byte for byte.

        Args:
            name: of the tensor.
            checkpoint: the source.

        Raises:
            ValueError: the dtype or the shape in the source is not the planned one.
            HeadwiseError: the source cannot be read, the tensor holds a NaN or an infinity, or the disk fails.
        """
        planned = self._planned[name]
        if planned.exponent or (planned.stored and planned.stored[0].source is None):
            self.write(name, checkpoint.read(planned.source or name))
            return
        if planned.stored and checkpoint.quantized is not None:
            checkpoint.quantized.tensors[name].check_scales(checkpoint.read_stored)
        for stored in planned.stored:
            assert checkpoint.quantized is not None and stored.source is not None
            own = checkpoint.quantized.stored[stored.source]
            self._stream(stored.name, checkpoint.stored_chunks(own, self._buffers))
        if planned.stored:
            return
        entry = checkpoint.tensors[planned.source or name]
        if (entry.dtype, entry.shape) != (planned.dtype, planned.shape):
            raise ValueError(f"{entry} cannot be copied, planned was {planned}")
        self._stream(name, checkpoint.chunks(planned.source or name, self._buffers))

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value in the journal, so that a resumed run finds it in `notes`.

        Args:
            key: its name.
            value: plain JSON data.

        Raises:
            DiskError: the disk fails.
        """
        with self._journal:
            self.notes[key] = value
            self.work.append({"note": key, "value": value})

    def add_text(self, name: str, text: str) -> None:
        """Write a small file, whole.

        Args:
            name: its path in the output.
            text: its content.

        Raises:
            DiskError: the disk fails.
        """
        self.work.add(name, text.encode())

    def add_file(self, path: Path, name: str | None = None) -> None:
        """Copy a small file byte for byte.

        Args:
            path: the file.
            name: its path in the output; None: the name of the file.

        Raises:
            DiskError: the file cannot be read, or the disk fails.
        """
        with os_errors(path, "read"):
            content = path.read_bytes()
        self.work.add(name or path.name, content)

    def finish(self) -> None:
        """Write the index, once every tensor is there; the folder can then be loaded and checked.

        Raises:
            ValueError: a tensor is not written.
            DiskError: the disk fails.
        """
        missing = self._tensors.keys() - self.hashes.keys()
        if missing:
            raise ValueError(f"{len(missing)} tensors were not written, {min(missing)} among them")
        with os_errors(self.work.out):
            for future in self._synced:
                future.result()
        if len(self.shards) > 1:
            self.add_text("model.safetensors.index.json", make_index(self.shards))

    def publish(self, check: Callable[[Path], None] | None = None) -> Path:
        """Finish, run `check` on the unpublished folder, then publish it as OUT by one rename.

        If `check` raises an exception, OUT stays as it was, and the work folder keeps the output.

        Args:
            check: a function of the unpublished folder that raises an exception if the folder is not valid.

        Returns:
            The published folder.

        Raises:
            ValueError: a tensor is not written.
            HeadwiseError: OUT exists and is not replaced, or the disk fails.
        """
        self.finish()
        if check:
            try:
                check(self.folder)
            except HeadwiseError as error:
                error.keeps_work = True  # every tensor is written: what took time is never thrown away
                raise
        self.work.publish()
        return self.work.out

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._hasher.shutdown(cancel_futures=True)
        self._syncer.shutdown(cancel_futures=True)
        self.work.close(error)

    def _restore(self) -> None:
        """Take over what an interrupted run wrote: its notes, and the tensors whose bytes are still right."""
        complete: set[str] = set()
        for line in self.work.journal:
            if "note" in line:
                self.notes[line["note"]] = line["value"]
            elif "shard" in line:
                complete.add(line["shard"])
            elif "tensor" in line:
                self.hashes[line["tensor"]] = line["sha256"]
                if line["tensor"] in self._tensors:  # a tensor that is written again opens its file again
                    complete.discard(self._tensors[line["tensor"]][1].file)
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.exists() or path.stat().st_size != shard.nbytes:
                self._lay_out(path, shard)
                for tensor in shard.tensors:
                    self.hashes.pop(tensor.name, None)
            elif shard.file not in complete:
                # The journal does not cover the header, which may have been cut off.
                self._lay_out(path, shard)
                # A power failure may have lost bytes that the journal lists as written.
                for tensor in shard.tensors:
                    if tensor.name in self.hashes and self._hash_on_disk(tensor, shard) != self.hashes[tensor.name]:
                        del self.hashes[tensor.name]
            self._left[shard.file] = sum(tensor.name not in self.hashes for tensor in shard.tensors)

    def _lay_out(self, path: Path, shard: Shard) -> None:
        """Give a weight file its length and its header; what else is in it stays."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            os.truncate(handle, shard.nbytes)
            write_all(handle, shard.header, 0)
        finally:
            os.close(handle)

    def _stream(self, name: str, chunks: Iterable[Tensor]) -> None:
        tensor, shard = self._tensors[name]
        digest = hashlib.sha256()
        pending: list[Future[None]] = []
        at = self._offsets[shard.file][name]
        with os_errors(self.work.out):
            handle = os.open(self.folder / shard.file, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                for chunk in chunks:
                    content = chunk.numpy().data
                    pending.append(self._hasher.submit(digest.update, content))
                    if not self.allow_nan:
                        refuse_nonfinite(name, chunk.view(tensor.dtype))
                    write_all(handle, content, at)
                    at += len(content)
                    if len(pending) == len(self._buffers):
                        # The next chunk overwrites the oldest.
                        pending.pop(0).result()
            finally:
                os.close(handle)
        for future in pending:
            future.result()
        with self._journal:
            self.hashes[name] = digest.hexdigest()
            self.work.append({"tensor": name, "sha256": self.hashes[name]})
            self._left[shard.file] -= 1
            if not self._left[shard.file]:
                self._synced.append(self._syncer.submit(self._complete, shard))

    def _complete(self, shard: Shard) -> None:
        sync(self.folder / shard.file)
        with self._journal:
            self.work.append({"shard": shard.file})

    def _hash_on_disk(self, tensor: OutputTensor, shard: Shard) -> str:
        digest, left = hashlib.sha256(), tensor.nbytes
        with open(self.folder / shard.file, "rb", buffering=0) as file:
            file.seek(self._offsets[shard.file][tensor.name])
            while left and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


def make_index(shards: Sequence[Shard]) -> str:
    """Return the text of model.safetensors.index.json.

    Args:
        shards: the weight files.
    """
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
