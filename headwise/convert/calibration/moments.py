"""Keep measured moments on disk, a file per layer, so that one calibration serves many conversions."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.io.workdir import write_file_atomically

INDEX = "moments.json"


def measured_beside_text(
    images: Path | None, moments: Path | None, checkpoint: Checkpoint
) -> Callable[[int], bool]:
    """Return a function of a layer's index: whether something measures that layer where text does not run it.

    Args:
        images: the setting; images run every layer.
        moments: the setting; saved moments of images hold such layers, and those of text do not. The folder is
            opened once, at the first layer that is asked for.
        checkpoint: the source.
    """

    @cache
    def saved(folder: Path) -> Moments:
        return Moments.open(folder, checkpoint)

    return lambda layer: images is not None or (moments is not None and saved(moments).holds(layer))


@dataclass(frozen=True)
class Moments:
    """The moments of one model on one text.

    Attributes:
        folder: with a file per layer.
        model: the fingerprint of the model they were taken from.
        text: the calibration text, as `calibrate` names it.
        sequences: number of sequences.
        length: tokens in each.
        seed: of the choice of text.
    """

    folder: Path
    model: str
    text: str
    sequences: int
    length: int
    seed: int

    @classmethod
    def create(cls, folder: Path, checkpoint: Checkpoint, calibration: Any) -> Moments:
        """Create a folder, or open one of an interrupted run to go on with it.

        Args:
            folder: where to keep the moments.
            checkpoint: the source.
            calibration: has text, sequences, length and seed.

        Raises:
            HeadwiseError: the folder exists and holds anything else, or cannot be made.
        """
        known = {name: getattr(calibration, name) for name in ("text", "sequences", "length", "seed")}
        moments = cls(folder, checkpoint.fingerprint(), **known)
        with suppress(HeadwiseError):
            if cls.open(folder, checkpoint) == moments:
                return moments
        try:
            folder.mkdir(parents=True)
            index = json.dumps({"model": moments.model, **known}, indent=2) + "\n"
            write_file_atomically(folder / INDEX, index.encode())
        except OSError as error:
            raise HeadwiseError(f"`save_moments` {folder}: {error.strerror}.", "Name a new folder.") from error
        return moments

    @classmethod
    def open(cls, folder: Path, checkpoint: Checkpoint) -> Moments:
        """Open a folder of moments.

        Args:
            folder: with the moments.
            checkpoint: the source, which must be the model that was measured.

        Raises:
            HeadwiseError: there are none, or they were taken from another model.
        """
        try:
            found = cls(folder, **json.loads((folder / INDEX).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise HeadwiseError(
                f"`moments` {folder} holds no moments.", "Name a folder that `save_moments` made."
            ) from error
        if found.model != checkpoint.fingerprint():
            raise HeadwiseError(
                f"`moments` {folder} was taken from another model than {checkpoint.source}.",
                "Measure them again with `save_moments`.",
            )
        return found

    def write(self, record: LayerRecord) -> None:
        """Write one layer in float32.

        Args:
            record: the statistics of the layer.
        """
        tensors = {**record.moments(), **record.norm_moments(), "distances": record.distances}
        kept = {n: t.to(torch.float32).cpu().contiguous() for n, t in tensors.items() if t is not None}
        write_file_atomically(self._path(record.index), lambda path: save_file(kept, path))

    def holds(self, layer: int) -> bool:
        """Return whether a layer was measured: text runs no vision tower, and images do.

        Args:
            layer: its index.
        """
        return self._path(layer).is_file()

    def read(self, layer: int, device: torch.device | str = "cpu") -> LayerRecord:
        """Read one layer in float64, without inputs and outputs.

        Args:
            layer: its index.
            device: of the result.

        Raises:
            HeadwiseError: the layer's file is missing or damaged.
        """
        try:
            tensors: dict[str, Any] = {n: t.double().to(device) for n, t in load_file(self._path(layer)).items()}
            return LayerRecord(layer, **tensors, tokens=self.sequences * self.length)
        except (OSError, SafetensorError, TypeError) as error:
            raise HeadwiseError(
                f"{self._path(layer)} is missing or damaged.", "Measure the moments again with `save_moments`."
            ) from error

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"
