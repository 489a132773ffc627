"""Make, read and compare headwise.json, the record of a converted folder."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from headwise import __version__
from headwise.environment import versions
from headwise.errors import HeadwiseError
from headwise.format import layout_names
from headwise.io.fs import os_errors
from headwise.io.reader import CHUNK, Checkpoint, make_buffers
from headwise.io.source import path_inside, read_json
from headwise.models.layout import AttentionLayout, CacheSize
from headwise.progress import SILENT, Progress

RECORD = "headwise.json"
# People may edit the card; weights are recorded tensor by tensor.
NOT_HASHED = (RECORD, "README.md")
PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")


class DecidedConversion(Protocol):
    """What the record of a conversion holds of its plan (`headwise.convert.plan.Plan` has it all)."""

    model: str
    revision: str | None
    arguments: dict[str, Any]
    layouts_before: tuple[AttentionLayout, ...]
    layouts_after: tuple[AttentionLayout, ...]
    cache_before: CacheSize
    cache_after: CacheSize
    bytes_before: int
    parameters_before: int

    @property
    def bytes_after(self) -> int: ...
    @property
    def parameters_after(self) -> int: ...


def make_manifest(
    plan: DecidedConversion,
    checkpoint: Checkpoint,
    *,
    out: str,
    hashes: Mapping[str, str],
    files: Mapping[str, str],
    layers: Mapping[int, Mapping[str, Any]],
    device: str,
    verification: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of headwise.json.

    Args:
        plan: the decided conversion.
        checkpoint: the source.
        out: the name of the output folder, for the command.
        hashes: SHA-256 of every output tensor's bytes.
        files: SHA-256 of every other file except this record and the card.
        layers: the report of every converted layer.
        device: the kind of device that layers were converted on.
        verification: the checks; None if none were made.
    """
    before, after = plan.layouts_before, plan.layouts_after
    return {
        "headwise": __version__,
        "command": command_of(plan, out, verified=verification is not None),
        "arguments": plan.arguments,
        "source": {
            "model": source_name(plan),
            "revision": plan.revision,
            "files": {
                name: {"bytes": state.size, "header_sha256": state.header}
                for name, state in checkpoint.files.items()
            },
        },
        "versions": versions(PACKAGES),
        "device": device,
        "attention": {
            "before": layout_names(before),
            "after": layout_names(after),
            "kind": after[0].kind,
            "shrinks": any(
                new.cache_elements_per_token < old.cache_elements_per_token
                for old, new in zip(before, after, strict=True)
            ),
        },
        "cache": {"before": _cache_bytes(plan.cache_before), "after": _cache_bytes(plan.cache_after)},
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "bytes": {"before": plan.bytes_before, "after": plan.bytes_after},
        "layers": {str(layer): dict(report) for layer, report in layers.items()},
        "verification": verification,
        "sha256": dict(sorted(hashes.items())),
        "files": dict(sorted(files.items())),
    }


def command_of(plan: DecidedConversion, out: str, *, verified: bool = True) -> str:
    """Return the command that makes the folder again, with every default in force written out."""
    model = f"{plan.model}@{plan.revision}" if plan.revision else source_name(plan)
    words = ["headwise", "convert", model, out]
    options = {key: value for key, value in plan.arguments.items() if key != "calibration"}
    measured = plan.arguments.get("calibration")
    if measured:
        options["calibrate"] = measured["text"]
        options["calibration_tokens"] = measured["sequences"] * measured["length"]
        options["refit"] = measured["steps"] or "off"
    elif options.get("to") in ("gqa", "mqa", "mla") and not options.get("exact"):
        options["calibrate"] = "none"
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words if verified else [*words, "--no-verify"])


def source_name(plan: DecidedConversion) -> str:
    """Return the repository, or the last part of a local path; the rest of a path is private."""
    return plan.model if plan.revision else Path(plan.model).resolve().name


def _cache_bytes(cache: CacheSize) -> dict[str, Any]:
    return {"bytes_per_token": cache.bytes_per_token, "at": {str(n): count for n, count in cache.at.items()}}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of headwise.json; None if there is no such file.

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
    """Return the SHA-256 of the small files: configuration, tokenizer, index, licence."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: hash_file(path)
        for name, path in files.items()
        if name not in NOT_HASHED and path.suffix != ".safetensors" and not name.startswith(".")
    }


def hash_tensors(checkpoint: Checkpoint, progress: Progress = SILENT) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes."""
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
    """Return the names of the recorded small files that changed or are missing."""
    recorded: Mapping[str, str] = record.get("files") or {}
    paths = {name: path_inside(folder, name) for name in recorded}
    return [n for n, path in paths.items() if not path.is_file() or hash_file(path) != recorded[n]]


def changed_tensors(checkpoint: Checkpoint, record: Mapping[str, Any], progress: Progress = SILENT) -> list[str]:
    """Return the names of the tensors that changed, are missing or are new."""
    recorded, found = record["sha256"], hash_tensors(checkpoint, progress)
    return sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))


def check_hashes(checkpoint: Checkpoint, progress: Progress = SILENT) -> tuple[bool, str]:
    """Compare every tensor and every small file with the hashes in headwise.json.

    Returns:
        Whether all agree, and a sentence about it.

    Raises:
        HeadwiseError: there is no headwise.json to compare with.
    """
    record = read_record(checkpoint.folder)
    if record is None:
        raise HeadwiseError(f"{checkpoint.folder} has no {RECORD}.", "Leave out `hashes` to check it without.")
    changed = changed_tensors(checkpoint, record, progress) + changed_files(checkpoint.folder, record)
    if changed:
        return False, f"{', '.join(changed[:3])} ({len(changed)} in all) not as written"
    return True, f"{len(record['sha256'])} tensors and {len(record.get('files') or {})} files are as written"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with os_errors(path, "read"), open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
