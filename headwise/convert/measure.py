"""Decide what is measured on the parent, measure it, and hand over the layers one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headwise.convert import forecast
from headwise.convert.architecture import Architecture
from headwise.convert.calibration import LayerRecord, LayerStream
from headwise.convert.checkpoint import Checkpoint
from headwise.convert.moments import Moments
from headwise.convert.target import Target
from headwise.errors import HeadwiseError
from headwise.progress import Progress


@dataclass(frozen=True)
class Calibration:
    """What is measured on the parent before its layers are converted, and with which text.

    `steps` of refit follow for every layer; 0: none. `keep` is the folder moments are saved to, `reuse` the one
    they are taken from instead of being measured.
    """

    text: str
    sequences: int
    length: int
    steps: int
    seed: int
    keep: Path | None = None
    reuse: Path | None = None

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def decide(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    text: str,
    tokens: int | None,
    moments: str | Path | None,
    save_moments: str | Path | None,
    refit: str | int,
    device: torch.device,
    seed: int,
) -> Calibration | None:
    """Decide what is measured; None: nothing."""
    if target.exact or not any(target.computed(i) for i in range(len(target.layouts))):
        if isinstance(refit, int):
            raise HeadwiseError("An exact conversion leaves nothing to refit.", "Leave out --refit.")
        return None
    if text == "none":
        if isinstance(refit, int):
            raise HeadwiseError("A refit learns from calibration text.", "Leave out --calibrate none or --refit.")
        return None
    if moments is not None:
        if isinstance(refit, int):
            raise HeadwiseError(
                "A refit needs the text itself, not its moments.", "Leave out --moments or --refit."
            )
        saved = Moments.open(Path(moments), checkpoint)
        return Calibration(saved.text, saved.sequences, saved.length, 0, saved.seed, reuse=Path(moments))
    length = min(forecast.CALIBRATION_LENGTH, forecast.trained_length(checkpoint, arch))
    steps = forecast.refit_steps(checkpoint, arch, target, refit, length, device)
    if not steps and not target.calibrated and save_moments is None:
        return None
    count = tokens if tokens is not None else forecast.calibration_tokens(checkpoint, arch, steps)
    if count < 2 * length:
        raise HeadwiseError(
            f"--calibration-tokens {count} is less than two sequences of {length} tokens.",
            f"Ask for {2 * length} or more.",
        )
    return Calibration(
        text, count // length, length, steps, seed, keep=Path(save_moments) if save_moments else None
    )


def notes(target: Target, calibration: Calibration | None, refit: str | int) -> Iterator[str]:
    if calibration is None:
        if target.calibrated:
            yield "Not calibrated: every direction of the attention input counts the same."
        return
    yield f"Calibration: {calibration.tokens:,} tokens of {calibration.text} in sequences of {calibration.length}."
    if calibration.steps:
        yield f"Refit: {calibration.steps} steps per layer."
    elif refit == "auto":
        yield "No refit: its forecast is over ten minutes on this device; --refit STEPS runs it all the same."


def records(
    checkpoint: Checkpoint,
    arch: Architecture,
    calibration: Calibration | None,
    layers: Sequence[int],
    device: torch.device,
    progress: Progress,
) -> Iterator[tuple[LayerRecord | None, int]]:
    """The layers named, each with what was measured of it."""
    if calibration is None:
        yield from ((None, i) for i in layers)
        return
    if calibration.reuse is not None:
        saved = Moments.open(calibration.reuse, checkpoint)
        yield from ((saved.read(i, device), i) for i in layers)
        return
    progress.note(
        f"Reading {calibration.tokens:,} tokens of {calibration.text} through the parent, layer by layer."
    )
    stream = LayerStream(checkpoint, arch, calibration_blocks(checkpoint, calibration), device)
    keep = Moments.create(calibration.keep, checkpoint, calibration) if calibration.keep else None
    for record in stream.records(keep=calibration.steps > 0, only=layers):
        if keep:
            keep.write(record)
        yield record, record.index


def calibration_blocks(checkpoint: Checkpoint, calibration: Calibration) -> Tensor:
    """The calibration text as tokens of the model, (sequences, length)."""
    from transformers import AutoTokenizer

    from headwise.recipes.data import blocks_from

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError) as error:
        raise HeadwiseError(
            f"{checkpoint.source} has no tokenizer that transformers can load, and calibration reads text.",
            "Add the tokenizer's files to the folder, or pass --calibrate none.",
        ) from error
    return blocks_from(
        calibration.text,
        tokenizer,
        split="calibration",
        length=calibration.length,
        count=calibration.sequences,
        seed=calibration.seed,
    )
