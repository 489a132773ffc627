"""Read headwise.json, and tell whether a folder is still the one that it describes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.io.fs import plain_errors
from headwise.io.reader import CHUNK, Checkpoint, make_buffers
from headwise.io.source import inside, read_json
from headwise.progress import SILENT, Progress

RECORD = "headwise.json"
# The card is for people to edit; the weights are recorded tensor by tensor.
NOT_HASHED = (RECORD, "README.md")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of headwise.json; None where there is no such file.

    Raises:
        HeadwiseError: it does not hold `arguments` and `sha256`.
    """
    if not (folder / RECORD).exists():
        return None
    record = read_json(folder, RECORD)
    known = {"files": {}} | record
    if not all(isinstance(known.get(key), dict) for key in ("arguments", "sha256", "files")):
        raise HeadwiseError(f"{folder / RECORD} has no arguments and sha256.", "Delete it to do without.")
    return record


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the small files: configuration, tokenizer, index, licence."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: hash_file(path)
        for name, path in files.items()
        if name not in NOT_HASHED and path.suffix != ".safetensors" and not name.startswith(".")
    }


def hash_tensors(checkpoint: Checkpoint, progress: Progress = SILENT) -> dict[str, str]:
    """SHA-256 of every tensor's bytes."""
    progress.stage("Hashing", total=checkpoint.nbytes, unit="bytes")
    found = {}
    buffers = make_buffers(1)
    for name in checkpoint.tensors:
        digest = hashlib.sha256()
        for chunk in checkpoint.chunks(name, buffers):
            content = chunk.numpy().data
            digest.update(content)
            progress.advance(len(content))
        found[name] = digest.hexdigest()
    return found


def changed_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Names of the small files that are not as recorded; those that the record does not know are no matter."""
    recorded: Mapping[str, str] = record.get("files") or {}
    paths = {name: inside(folder, name) for name in recorded}
    return [n for n, path in paths.items() if not path.is_file() or hash_file(path) != recorded[n]]


def changed_tensors(checkpoint: Checkpoint, record: Mapping[str, Any], progress: Progress = SILENT) -> list[str]:
    """Names of the tensors that are not as recorded, on either side."""
    recorded, found = record["sha256"], hash_tensors(checkpoint, progress)
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def check_hashes(checkpoint: Checkpoint, progress: Progress = SILENT) -> tuple[bool, str]:
    """Whether every tensor and every small file is byte for byte what headwise.json says, in words.

    Raises:
        HeadwiseError: there is no headwise.json to compare with.
    """
    record = read_record(checkpoint.folder)
    if record is None:
        raise HeadwiseError(f"{checkpoint.folder} has no {RECORD}.", "Leave out --hashes to check it without.")
    changed = changed_tensors(checkpoint, record, progress) + changed_files(checkpoint.folder, record)
    if changed:
        return False, f"{', '.join(changed[:3])} ({len(changed)} in all) not as written"
    return True, f"{len(record['sha256'])} tensors and {len(record.get('files') or {})} files are as written"


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with plain_errors(path, "read"), open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
