"""What a training run leaves behind: a stock folder, its record and its card."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor

from headwise import __version__, environment
from headwise.convert.verify.check import check_folder
from headwise.demo.demo import MODEL
from headwise.errors import GateFailed, HeadwiseError
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.io.source import read_json
from headwise.io.writer import Writer
from headwise.records.card import inherited, with_section, without_evaluation
from headwise.records.manifest import RECORD, hash_files
from headwise.train.student import ModelFolder, Student

CARD, CURVES = "README.md", ("curve.csv", "curve.png")
SECTION = "Uptraining"


def begin(writer: Writer, home: Path) -> None:
    """Make the place of a run's checkpoints; empty, unless the run goes on."""
    if "training" not in writer.notes:
        shutil.rmtree(home, ignore_errors=True)
        writer.note("training", True)
    home.mkdir(parents=True, exist_ok=True)


def write_model(student: Student, state: Mapping[str, Tensor], folder: Path) -> None:
    """The stock model of a checkpoint, one weight file, with its tokenizer."""
    source = student.folder.checkpoint
    folder.mkdir(parents=True)
    tensors = dict(student.export(state))
    tensors |= {name: source.read(name) for name in source.tensors if name not in tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in (source.folder / "config.json", *source.sidecars):
        to = folder / path.relative_to(source.folder)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)


def add_files(writer: Writer, checkpoint: Checkpoint, home: Path) -> None:
    """Everything beside the weights but the record and the card: as it was, and the curve of the run."""
    writer.add_file(checkpoint.folder / "config.json")
    for path in checkpoint.sidecars:
        writer.add_file(path, path.relative_to(checkpoint.folder).as_posix())
    for name in CURVES:
        if (home / name).exists():
            writer.add_file(home / name, f"uptraining{Path(name).suffix}")


def describe(
    writer: Writer, facts: Mapping[str, Any], before: Mapping[str, Any] | None, checkpoint: Checkpoint
) -> None:
    """Check the unpublished folder, then write headwise.json and the card.

    Args:
        facts: of this run. before: the record of the folder that was trained.

    Raises:
        GateFailed: the folder failed a check.
    """
    record: dict[str, Any] = {"headwise": __version__, "arguments": {}, "source": {"model": name_of(checkpoint)}}
    record |= before or {}
    record["uptraining"] = [*(before or {}).get("uptraining", []), dict(facts)]
    found = check_folder(open_checkpoint(writer.folder), None, arguments=record["arguments"])
    if not found.passed:
        raise GateFailed(f"The result failed its verification: {found.failures}.")
    record |= {
        "verification": found.to_dict(),
        "sha256": dict(sorted(writer.hashes.items())),
        "files": dict(sorted(hash_files(writer.folder).items())),
    }
    writer.add_text(RECORD, json.dumps(record, indent=2) + "\n")
    card = checkpoint.folder / CARD
    text = without_evaluation(card.read_text(encoding="utf-8")) if card.is_file() else _new_card(checkpoint)
    writer.add_text(CARD, with_section(text, SECTION, "\n".join(_section(facts)), before="Checks"))


def _new_card(checkpoint: Checkpoint) -> str:
    data = ModelCardData(
        base_model=checkpoint.source if checkpoint.revision else None,
        library_name="transformers",
        tags=["headwise"],
        **inherited(None),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name_of(checkpoint)}, uptrained\n"))


def _section(facts: Mapping[str, Any]) -> Iterator[str]:
    nats, held = facts["nats"], facts["heldout"]
    teacher = f", learning from `{facts['teacher']}`" if facts["teacher"] else ""
    yield f"Trained after the conversion with the recipe `{facts['recipe']}`{teacher}."
    yield ""
    yield f"| | nats per token on {held['tokens']:,} tokens of {held['text']} |"
    yield "|---|---|"
    for name, value in nats.items():
        if value is not None:
            yield f"| {name} | {value:.4f} |"
    yield ""
    if facts["layerwise"]:
        stage = facts["settings"]["layerwise"]
        yield f"- layer by layer: {stage['steps']} steps of each on {stage['tokens']:,} tokens"
    if facts["tokens"]:
        yield f"- end to end: {facts['tokens']:,} tokens in {facts['steps']:,} steps, {facts['seconds']:,.0f} s"
    yield f"- text: {', '.join(facts['settings']['data']['text'])}"
    yield f"- hardware: {facts['hardware']}"
    if facts["command"]:
        yield f"- command: `{facts['command']}`"


def recorded_source(record: Mapping[str, Any] | None, checkpoint: Checkpoint) -> str | Path | None:
    """The parent that a folder's record names: a repository, or a folder of that name beside it, in the working
    directory or in this package, whose files are the recorded ones."""
    source = (record or {}).get("source")
    if not isinstance(source, dict) or not isinstance(source.get("model"), str):
        return None
    if source.get("revision"):
        return f"{source['model']}@{source['revision']}"
    places = [checkpoint.folder.parent / source["model"], Path(source["model"]), MODEL]
    return next((place for place in places if _is_recorded(place, source.get("files"))), None)


def _is_recorded(folder: Path, files: Any) -> bool:
    if not isinstance(files, dict) or not (folder / "config.json").is_file():
        return False
    try:
        found = open_checkpoint(folder).files
    except HeadwiseError:
        return False
    states = {name: {"bytes": state.size, "header_sha256": state.header} for name, state in found.items()}
    return states == files


def pretraining_tokens(*folders: ModelFolder | None) -> int | None:
    """What a folder's training.json says that its model was trained on, where a folder has one."""
    for folder in folders:
        path = folder.checkpoint.folder / "training.json" if folder else None
        if path is not None and path.is_file():
            tokens = read_json(path.parent, path.name).get("tokens")
            if isinstance(tokens, int):
                return tokens
    return None


def name_of(checkpoint: Checkpoint) -> str:
    """The repository and its commit, or the last part of a local path: the rest of it is nobody's business."""
    if checkpoint.revision:
        return f"{checkpoint.source.partition('@')[0]}@{checkpoint.revision}"
    return checkpoint.folder.resolve().name


def hardware() -> str:
    """What the run ran on."""
    if torch.cuda.is_available():
        return f"{PartialState().num_processes} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return environment.versions(("headwise", "torch", "transformers", "accelerate", "tokenizers"))
