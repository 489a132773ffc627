"""Measured moments on disk, so that one calibration serves many conversions: a folder with a file per layer."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint

INDEX = "moments.json"


@dataclass(frozen=True)
class Moments:
    """The moments of one model on one text: which model (`model`, its fingerprint), and how they were taken."""

    folder: Path
    model: str
    text: str
    sequences: int
    length: int
    seed: int

    @classmethod
    def create(cls, folder: Path, checkpoint: Checkpoint, calibration: Any) -> Moments:
        """Begin a folder, or go on with one that an interrupted run began.

        Args:
            calibration: says text, sequences, length and seed.

        Raises:
            HeadwiseError: the folder exists and holds anything else, or cannot be made.
        """
        known = {name: getattr(calibration, name) for name in ("text", "sequences", "length", "seed")}
        made = cls(folder, checkpoint.fingerprint(), **known)
        with suppress(HeadwiseError):
            if cls.open(folder, checkpoint) == made:
                return made
        try:
            folder.mkdir(parents=True)
            (folder / INDEX).write_text(json.dumps({"model": made.model, **known}, indent=2) + "\n")
        except OSError as error:
            raise HeadwiseError(f"--save-moments {folder}: {error.strerror}.", "Name a new folder.") from error
        return made

    @classmethod
    def open(cls, folder: Path, checkpoint: Checkpoint) -> Moments:
        """Raises HeadwiseError if there are none, or if they were taken from another model."""
        try:
            found = cls(folder, **json.loads((folder / INDEX).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise HeadwiseError(
                f"--moments {folder} holds no moments.", "Name a folder that --save-moments made."
            ) from error
        if found.model != checkpoint.fingerprint():
            raise HeadwiseError(
                f"--moments {folder} was taken from another model than {checkpoint.source}.",
                "Leave it out, and --save-moments takes them anew.",
            )
        return found

    def write(self, record: LayerRecord) -> None:
        """Keep one layer, in float32."""
        tensors = {**record.moments(), "distances": record.distances}
        kept = {n: t.to(torch.float32).cpu().contiguous() for n, t in tensors.items() if t is not None}
        save_file(kept, self._path(record.index))

    def read(self, layer: int, device: torch.device | str = "cpu") -> LayerRecord:
        """One layer in float64; it has no inputs and outputs.

        Raises:
            HeadwiseError: the layer's file is missing or damaged.
        """
        try:
            tensors: dict[str, Any] = {n: t.double().to(device) for n, t in load_file(self._path(layer)).items()}
            return LayerRecord(layer, **tensors, tokens=self.sequences * self.length)
        except (OSError, SafetensorError, TypeError) as error:
            raise HeadwiseError(
                f"{self._path(layer)} is missing or damaged.", "Take the moments again with --save-moments."
            ) from error

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"
