"""Make, read and compare headwise.json, the record of a converted folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from headwise.environment import HEADWISE_VERSION, versions
from headwise.errors import HeadwiseError
from headwise.format import layout_names, public_command, public_data
from headwise.io.fs import os_errors
from headwise.io.quantized.powers import POWERS, powers_of
from headwise.io.reader import CHUNK, Checkpoint, make_buffers
from headwise.io.source import find_weights, path_inside, read_json
from headwise.models.layout import AttentionLayout, CacheSize
from headwise.models.protocol import find_attention_model
from headwise.progress import SILENT, Progress

RECORD = "headwise.json"
# People may edit the card; weights are recorded tensor by tensor.
NOT_HASHED = (RECORD, "README.md")
# The keys of the arguments that are no settings, but what was measured or decided.
MEASURED = ("calibration", "joint", "windows", "indexers")
PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")


class ServingVerdict(Protocol):
    """The part of `headwise.serving.engines.EngineVerdict` that the record needs."""

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""


class DecidedConversion(Protocol):
    """The part of `headwise.convert.plan.Plan` that its record needs."""

    @property
    def model(self) -> str:
        """The source, as the user named it."""

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repository; None for a local folder."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings in force."""

    @property
    def flags(self) -> Mapping[str, str]:
        """The spelling of every setting on the command line."""

    @property
    def config(self) -> dict[str, Any]:
        """The new config.json."""

    @property
    def exact(self) -> bool:
        """Whether the output computes the parent's function."""

    @property
    def parts(self) -> tuple[Any, ...]:
        """Every part of a model of several, a dataclass each."""

    @property
    def layouts_before(self) -> tuple[AttentionLayout, ...]:
        """The layouts of the source."""

    @property
    def layouts_after(self) -> tuple[AttentionLayout, ...]:
        """The layouts of the output."""

    @property
    def cache_before(self) -> CacheSize:
        """KV cache of the source."""

    @property
    def cache_after(self) -> CacheSize:
        """KV cache of the output."""

    @property
    def engines(self) -> Sequence[ServingVerdict]:
        """The verdicts of serving engines on the output."""

    @property
    def bytes_before(self) -> int:
        """Bytes of the source's weights."""

    @property
    def parameters_before(self) -> int:
        """Number of parameters of the source."""

    @property
    def bytes_after(self) -> int:
        """Bytes of the output's weights."""

    @property
    def parameters_after(self) -> int:
        """Number of parameters of the output."""


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
    refit: Sequence[Mapping[str, Any]] = (),
    text_loss: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of headwise.json.

    Args:
        plan: the decided conversion.
        checkpoint: the source.
        out: the name of the output folder, for the command.
        hashes: SHA-256 of every output tensor's bytes.
        files: SHA-256 of every other file, except this record and the card.
        layers: the report of every converted layer.
        device: the kind of device that layers were converted on.
        verification: the checks; None if none were made.
        refit: the stages of a joint refit.
        text_loss: losses on held-back calibration text; None if they were not measured.
    """
    before, after = plan.layouts_before, plan.layouts_after
    return {
        "headwise": HEADWISE_VERSION,
        "command": command_of(plan, out, verification),
        "arguments": public_data(plan.arguments),
        "source": source_record(plan, checkpoint),
        "versions": versions(PACKAGES),
        "device": device,
        "class": next(iter(plan.config.get("architectures") or []), None),
        "auto_class": find_attention_model(plan.config).auto_class,
        "exact": plan.exact,
        "attention": {
            "before": layout_names(before),
            "after": layout_names(after),
            "kind": next((layout for layout in after if layout.cached), after[0]).kind,
            "shrinks": any(
                new.cache_elements_per_token < old.cache_elements_per_token
                for old, new in zip(before, after, strict=True)
            ),
        },
        "cache": {"before": _cache_bytes(plan.cache_before), "after": _cache_bytes(plan.cache_after)},
        "parts": [asdict(part) for part in plan.parts],
        POWERS: powers_of(plan.config),
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "bytes": {"before": plan.bytes_before, "after": plan.bytes_after},
        "engines": [verdict.to_dict() for verdict in plan.engines],
        "layers": {str(layer): dict(report) for layer, report in layers.items()},
        "refit": [dict(stage) for stage in refit],
        "text_loss": None if text_loss is None else dict(text_loss),
        "verification": verification,
        "sha256": dict(sorted(hashes.items())),
        "files": dict(sorted(files.items())),
    }


def command_of(plan: DecidedConversion, out: str, verification: Mapping[str, Any] | None) -> str:
    """Return the command that repeats the conversion, with all defaults in force.

    Args:
        plan: the decided conversion.
        out: the name of the output folder.
        verification: the checks; None if none were made.
    """
    model = f"{plan.model}@{plan.revision}" if plan.revision else source_name(plan)
    command = ["headwise", "convert", model, out]
    options = {key: value for key, value in plan.arguments.items() if key not in MEASURED}
    measured = plan.arguments.get("calibration")
    if measured:
        options["images" if "images" in measured else "calibrate"] = measured["text"]
        if "images" not in measured:
            options["calibration_tokens"] = measured["sequences"] * measured["length"]
        if "index_steps" in measured:
            options["index_steps"] = measured["index_steps"]
        if not options.get("exact"):
            options["refit"] = measured["steps"] or "off"
    elif options.get("to") in ("gqa", "mqa", "mla") and not options.get("exact"):
        options["calibrate"] = "none"
    if plan.arguments.get("joint"):
        joint = plan.arguments["joint"]
        stage = "windows" if joint.get("windows_steps") else "joint"
        options |= {"refit": stage} | {f"refit_{name}": joint[name] for name in ("tokens", "length", "repeats")}
    for key, value in options.items():
        flag = plan.flags[key]
        for word in value if isinstance(value, list) else [value]:
            command += [flag] if word is True else [flag, str(word)]
    if verification is None:
        command.append("--no-verify")
    else:
        command += [word for name in verification.get("accepted", ()) for word in ("--accept", name)]
    return public_command(command)


def source_record(plan: DecidedConversion, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the source as headwise.json records it: name, commit, and the size and header of every weight file.

    Args:
        plan: the decided conversion.
        checkpoint: the source.
    """
    files = {name: {"bytes": state.size, "header_sha256": state.header} for name, state in checkpoint.files.items()}
    return {"model": source_name(plan), "revision": plan.revision, "files": files}


def source_name(plan: DecidedConversion) -> str:
    """Return the repository, or the last part of a local path: the rest may be private.

    Args:
        plan: the decided conversion.
    """
    return plan.model if plan.revision else Path(plan.model).resolve().name


def _cache_bytes(cache: CacheSize) -> dict[str, Any]:
    return {"bytes_per_token": cache.bytes_per_token, "at": {str(n): count for n, count in cache.at.items()}}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of headwise.json; None if there is no such file.

    Args:
        folder: a model folder.

    Raises:
        HeadwiseError: the file has no `arguments` and `sha256`.
    """
    if not (folder / RECORD).exists():
        return None
    record = read_json(folder, RECORD)
    known = {"files": {}} | record
    if not all(isinstance(known.get(key), dict) for key in ("arguments", "sha256", "files")):
        raise HeadwiseError(
            f"{folder / RECORD} has no arguments and sha256.", "Delete the file to continue without a record."
        )
    return record


def recorded_damage(folder: Path) -> tuple[float, ...]:
    """Return the estimated damage of every layer, in nats per token; empty if it is not recorded for all.

    Args:
        folder: a model folder.

    Raises:
        HeadwiseError: headwise.json cannot be read.
    """
    record = read_record(folder)
    layers = record.get("layers") if record else None
    if not isinstance(layers, dict):
        return ()
    reports = [layers.get(str(layer)) for layer in range(len(layers))]
    damage = [report.get("damage") if isinstance(report, dict) else None for report in reports]
    known = tuple(nats for nats in damage if isinstance(nats, float))
    return known if len(known) == len(layers) else ()


def accepted_checks(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the failed checks that the user accepted when the folder was written.

    Args:
        record: the content of headwise.json.
    """
    verification = record.get("verification")
    accepted = verification.get("accepted") if isinstance(verification, dict) else None
    return [name for name in accepted if isinstance(name, str)] if isinstance(accepted, list) else []


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the small files by name: configuration, tokenizer, index, licence.

    Args:
        folder: a converted folder.
    """
    return {
        name: hash_file(path)
        for name, path in _visible_files(folder).items()
        if name not in NOT_HASHED and path.suffix != ".safetensors"
    }


def _visible_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder and of the folders in it by name; a dot hides a file or a folder."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    return {
        name.as_posix(): path
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def hash_tensors(checkpoint: Checkpoint, progress: Progress = SILENT) -> dict[str, str]:
    """Return the SHA-256 of the bytes of every tensor of the files, by name.

    Args:
        checkpoint: an opened folder.
        progress: gets one stage.
    """
    progress.stage("Hashing", total=checkpoint.stored_bytes, unit="bytes")
    hashes = {}
    buffers = make_buffers(1)
    for name, entry in checkpoint.stored.items():
        digest = hashlib.sha256()
        stored = (
            checkpoint.stored_chunks(entry, buffers)
            if checkpoint.gguf is None
            else checkpoint.chunks(name, buffers)
        )
        for chunk in stored:
            content = chunk.numpy().data
            digest.update(content)
            progress.advance(len(content))
        hashes[name] = digest.hexdigest()
    return hashes


def changed_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the names of the small files that changed, are missing or are new, and of weight files that are new.

    A new file can change what a library loads: an adapter, a chat template, added tokens.

    Args:
        folder: a converted folder.
        record: its headwise.json.
    """
    recorded: Mapping[str, str] = record.get("files") or {}
    paths = {name: path_inside(folder, name) for name in recorded}
    changed = [n for n, path in paths.items() if not path.is_file() or hash_file(path) != recorded[n]]
    expected = {*recorded, *NOT_HASHED, *find_weights(folder)[0]}
    new = [name for name in _visible_files(folder) if name not in expected] if recorded else []
    return changed + new


def changed_tensors(checkpoint: Checkpoint, record: Mapping[str, Any], progress: Progress = SILENT) -> list[str]:
    """Return the names of the tensors that changed, are missing or are new.

    Args:
        checkpoint: an opened folder.
        record: its headwise.json.
        progress: gets one stage.
    """
    recorded, hashes = record["sha256"], hash_tensors(checkpoint, progress)
    return sorted(name for name in recorded.keys() | hashes.keys() if recorded.get(name) != hashes.get(name))


def check_hashes(checkpoint: Checkpoint, progress: Progress = SILENT) -> tuple[bool, str]:
    """Compare every tensor and every small file with the hashes in headwise.json.

    Args:
        checkpoint: an opened folder.
        progress: gets one stage.

    Returns:
        Whether all are equal, and a detail for the reader.

    Raises:
        HeadwiseError: there is no headwise.json to compare with.
    """
    record = read_record(checkpoint.folder)
    if record is None:
        raise HeadwiseError(
            f"{checkpoint.folder} has no {RECORD}.", "Leave out `hashes` to check the folder without it."
        )
    changed = changed_tensors(checkpoint, record, progress) + changed_files(checkpoint.folder, record)
    if changed:
        return False, f"{', '.join(changed[:3])} ({len(changed)} in all) changed"
    return True, f"{len(record['sha256'])} tensors and {len(record.get('files') or {})} files are unchanged"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Args:
        path: the file.
    """
    digest = hashlib.sha256()
    with os_errors(path, "read"), open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
