"""Write the result of a training run: the stock folder, its record and its model card."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor

from headwise.convert.verify.check import check_folder
from headwise.environment import HEADWISE_VERSION
from headwise.errors import GateFailed
from headwise.io.quantized.powers import POWERS, as_stored, exponent_of, is_exact
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.io.source import read_json
from headwise.io.tokenizer import tokenizer_kind
from headwise.io.workdir import write_file_atomically
from headwise.io.writer import OutputTensor, Writer
from headwise.progress import SILENT, Progress
from headwise.records.card import render_card
from headwise.records.manifest import RECORD, hash_files
from headwise.records.parent import PARENT, read_parent_path
from headwise.serving.engines import engine_verdicts
from headwise.train.student import ModelFolder, Student

CARD, CURVES = "README.md", ("curve.csv", "curve.png", "curve.svg")
# Packages whose versions decide the numbers of a run.
RECORDED_PACKAGES = ("headwise", "torch", "transformers", "accelerate", "tokenizers")


def start_training_dir(writer: Writer, training_dir: Path) -> None:
    """Make the folder of a run's checkpoints: empty, or as it is where the run is resumed.

    Args:
        writer: of the output folder; its journal remembers that training began.
        training_dir: the folder.
    """
    if "training" not in writer.notes:
        shutil.rmtree(training_dir, ignore_errors=True)
        writer.note("training", True)
    training_dir.mkdir(parents=True, exist_ok=True)


def write_stock_model(student: Student, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the stock model of a checkpoint: one weight file, the config and the tokenizer.

    Args:
        student: the model in training.
        state: its whole state dict, on the CPU.
        folder: a folder that does not exist yet.
    """
    source = student.folder.checkpoint
    folder.mkdir(parents=True)
    tensors = dict(student.export(state))
    tensors |= {name: source.read(name) for name in source.tensors if name not in tensors}
    write_file_atomically(folder / "model.safetensors", lambda to: save_file(tensors, to, {"format": "pt"}))
    write_file_atomically(folder / "config.json", _config_text(source).encode())
    for path in source.sidecars:
        to = folder / path.relative_to(source.folder)
        to.parent.mkdir(exist_ok=True)
        write_file_atomically(to, partial(shutil.copyfile, path))


def _config_text(checkpoint: Checkpoint) -> str:
    """Return the config of a trained folder: the folder's own, without how weights are stored."""
    if checkpoint.is_plain:
        return (checkpoint.folder / "config.json").read_text(encoding="utf-8")
    return json.dumps(checkpoint.config, indent=2) + "\n"


def planned_outputs(checkpoint: Checkpoint) -> list[OutputTensor]:
    """Return the tensors of a trained folder.

    Args:
        checkpoint: the folder that is trained.
    """
    return [OutputTensor(e.name, e.dtype, e.shape, e.name) for e in checkpoint.tensors.values()]


def write_tensors(writer: Writer, student: Student, state: Mapping[str, Tensor], progress: Progress) -> None:
    """Write the tensors of a trained folder, stored with the powers of two of the folder that was trained.

    Where a trained weight would lose digits by its power, all weights are stored in their natural size.

    Args:
        writer: of the output folder; its journal keeps the powers that are used.
        student: the trained model.
        state: its whole state dict, on the CPU.
        progress: gets the bytes, and a warning where the powers are left out.
    """
    checkpoint = student.folder.checkpoint
    if POWERS not in writer.notes:
        writer.note(POWERS, _exact_powers(student, state, progress))
    powers = writer.notes[POWERS]
    for name, tensor in student.export(state):
        if name not in writer.done:
            writer.write(name, as_stored(name, tensor, exponent_of(name, powers)))
            progress.advance(tensor.nbytes)
    for name in checkpoint.tensors:
        if name in writer.done:
            continue
        if exponent := exponent_of(name, powers):
            writer.write(name, as_stored(name, checkpoint.read(name), exponent))
        else:
            writer.copy(name, checkpoint)


def _exact_powers(student: Student, state: Mapping[str, Tensor], progress: Progress) -> dict[str, int]:
    """Return the powers of two of a folder; none where a trained weight cannot be stored with its own."""
    powers = student.folder.checkpoint.powers
    for name, tensor in student.export(state) if powers else ():
        if not is_exact(tensor, exponent := exponent_of(name, powers)):
            progress.warn(
                f"The trained weights are stored without powers of two, because {name} times 2^{exponent} loses "
                "digits. Quantize the folder with the options of its card: without them llama-quantize destroys it."
            )
            return {}
    return powers


def add_files(writer: Writer, checkpoint: Checkpoint, training_dir: Path) -> None:
    """Add the files beside the weights, except the record and the card.

    Args:
        writer: of the output folder.
        checkpoint: the folder that was trained: its config and sidecars are copied.
        training_dir: the run's folder with the curve.
    """
    text = _config_text(checkpoint)
    if powers := writer.notes[POWERS]:
        text = json.dumps({**checkpoint.config, POWERS: powers}, indent=2) + "\n"
    writer.add_text("config.json", text)
    for path in checkpoint.sidecars:
        writer.add_file(path, path.relative_to(checkpoint.folder).as_posix())
    for name in CURVES:
        if (training_dir / name).exists():
            writer.add_file(training_dir / name, f"uptraining{Path(name).suffix}")


def check_export(
    student: Student, folder: Path, arguments: Mapping[str, Any], accept: Collection[str], progress: Progress
) -> None:
    """Export the untrained model and check it, so that a check which fails does so before the first step.

    Args:
        student: the model, before its training.
        folder: where it is exported to; removed afterwards.
        arguments: settings of the conversion.
        accept: names of checks whose failure is accepted.
        progress: gets one stage.

    Raises:
        GateFailed: a check failed that is not in `accept`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_stock_model(student, student.network.state_dict(), folder)
        verification = check_folder(open_checkpoint(folder), None, arguments=arguments, progress=progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    verification = verification.accepting(accept)
    if verification.refused:
        source = student.folder.checkpoint.source
        raise GateFailed(
            f"Nothing was trained: {source} fails its verification already, {verification.failures}.",
            f"Convert it again, or train it in spite of this with `accept` {' '.join(verification.refused)}.",
        )


def verify_and_write_metadata(
    writer: Writer,
    facts: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    checkpoint: Checkpoint,
    accept: Collection[str] = (),
    progress: Progress = SILENT,
) -> None:
    """Verify the unpublished folder, and write headwise.json and the model card.

    Args:
        writer: of the output folder.
        facts: of this run, for the record.
        before: the record of the folder that was trained.
        checkpoint: the folder that was trained.
        accept: names of checks whose failure is accepted and recorded.
        progress: gets one stage.

    Raises:
        GateFailed: the folder failed a check that is not in `accept`; both files are written.
    """
    record = record_before(before, checkpoint)
    record["uptraining"] = [*record.get("uptraining", []), dict(facts)]
    if checkpoint.powers and not writer.notes[POWERS]:
        record |= {POWERS: {}, "engines": _natural_engines(checkpoint, record)}
    verification = check_folder(
        open_checkpoint(writer.folder), None, arguments=record["arguments"], progress=progress
    )
    verification = verification.accepting(accept)
    record |= {
        "verification": verification.to_dict(),
        "sha256": dict(sorted(writer.hashes.items())),
        "files": dict(sorted(hash_files(writer.folder).items())),
    }
    writer.add_text(RECORD, json.dumps(record, indent=2) + "\n")
    writer.add_text(CARD, render_card(record, checkpoint.folder / CARD))
    if (parent := read_parent_path(checkpoint.folder)) is not None:
        writer.add_text(PARENT, f"{parent}\n")
    verification.require(writer.folder)


def _natural_engines(checkpoint: Checkpoint, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdicts of a record's engines on weights that are stored in their natural size."""
    engines = [verdict["name"] for verdict in record.get("engines") or []]
    tokenizer = tokenizer_kind(checkpoint.folder)
    return [v.to_dict() for v in engine_verdicts(checkpoint.config, tokenizer=tokenizer, engines=engines)]


def record_before(before: Mapping[str, Any] | None, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the record of a folder before its training.

    Args:
        before: its headwise.json; None: headwise did not write the folder.
        checkpoint: the folder.
    """
    source = {"model": model_name(checkpoint).partition("@")[0], "revision": checkpoint.revision}
    return {"headwise": HEADWISE_VERSION, "arguments": {}, "source": source} | dict(before or {})


def pretraining_tokens(*folders: ModelFolder | None) -> int | None:
    """Return the number of pretraining tokens from the first folder whose training.json has it.

    Args:
        folders: model folders, or None for those that there are not.

    Returns:
        The tokens; None where no folder has them.
    """
    for folder in folders:
        path = folder.checkpoint.folder / "training.json" if folder else None
        if path is not None and path.is_file():
            tokens = read_json(path.parent, path.name).get("tokens")
            if isinstance(tokens, int):
                return tokens
    return None


def model_name(checkpoint: Checkpoint) -> str:
    """Return the repository and its commit, or the last part of a local path: the rest may be private.

    Args:
        checkpoint: an opened folder.
    """
    if checkpoint.revision:
        return f"{checkpoint.source.partition('@')[0]}@{checkpoint.revision}"
    return checkpoint.path.resolve().name


def hardware() -> str:
    """Return the kind and number of devices of the run."""
    if PartialState().device.type == "cuda":
        return f"{PartialState().num_processes} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
