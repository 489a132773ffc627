"""What is measured on the parent before its layers are converted, and what the plan states of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.convert.base import Target
from headwise.convert.calibration.corpus import BUILTIN, MIXTURE, SAMPLED
from headwise.convert.calibration.layer_stream import NUM_ATTENTION_SEQUENCES
from headwise.convert.forecast.amounts import trained_length
from headwise.convert.settings import ConvertSettings
from headwise.models.protocol import AttentionModel

# What the texts that `auto` chooses hold.
FOREIGN = {
    MIXTURE: "English prose, dialogue and Python of this package",
    BUILTIN: "the library of the running Python",
}


@dataclass(frozen=True)
class CalibrationPlan:
    """What is measured on the parent before its layers are converted, and on which text.

    Attributes:
        text: as `calibrate` names it.
        sequences: number of sequences.
        length: tokens in each.
        steps: of regression for every layer; 0: none.
        seed: of the choice of text.
        reason: why `auto` chose the text; None if the settings named it.
        fitted: whether output matrices are solved for.
        keep: folder to save the moments in.
        reuse: folder to read the moments from instead of measuring them.
        index_heads: queries of the indexer of a layer; 0: no indexers are made.
        index_steps: of training for every indexer.
        asked: tokens that the settings name, before they are rounded down to whole sequences; None: none.
        refit_reason: why `auto` chose the steps; None if the settings gave them.
        least: sequences that are enough where the text has no more; None: all.
        images: the file of image-text pairs that is read in place of text; None: text is read.
    """

    text: str
    sequences: int
    length: int
    steps: int
    seed: int
    reason: str | None = None
    fitted: bool = False
    keep: Path | None = None
    reuse: Path | None = None
    index_heads: int = 0
    index_steps: int = 0
    asked: int | None = None
    refit_reason: str | None = None
    least: int | None = None
    images: Path | None = None

    @property
    def keeps_text(self) -> bool:
        """Return whether each layer's inputs and outputs are kept until it is converted."""
        return self.refits or self.index_heads > 0

    @property
    def refits(self) -> bool:
        """Return whether output matrices are solved for, or layers are regressed."""
        return self.fitted or self.steps > 0

    @property
    def foreign(self) -> bool:
        """Return whether the user did not choose the text and the parent did not write it."""
        return self.reason is not None and self.text in (MIXTURE, BUILTIN)

    @property
    def tokens(self) -> int:
        """Return the number of calibration tokens."""
        return self.sequences * self.length

    @property
    def amount(self) -> str:
        """Return the number of tokens in words, and that it is rounded; of images, the number of pairs."""
        if self.images is not None:
            return f"{self.sequences:,} image-text pairs"
        rounded = f" (rounded down from {self.asked:,})" if self.asked not in (None, self.tokens) else ""
        return f"{self.tokens:,} tokens{rounded}"

    def described(self) -> dict[str, Any]:
        """Return what the measurement depends on, for the record; local folders are left out."""
        names = ("text", "sequences", "length", "steps", "seed", *(["index_steps"] if self.index_heads else []))
        kind = {"images": True} if self.images is not None else {}
        return {name: getattr(self, name) for name in names} | kind


def plan_notes(
    arch: AttentionModel, target: Target, calibration: CalibrationPlan | None, settings: ConvertSettings
) -> Iterator[str]:
    """Yield the lines of the plan that describe the calibration.

    Args:
        arch: the architecture of the source.
        target: the decided conversion.
        calibration: what is measured on the parent; None: nothing.
        settings: of the conversion.
    """
    if calibration is None:
        if target.calibrated and not target.exact:
            yield "Not calibrated: every direction of the attention input counts the same."
        return
    if calibration.images is None:
        text = "text sampled from the parent" if calibration.text == SAMPLED else calibration.text
        yield f"Calibration: {calibration.amount} of {text} in sequences of {calibration.length}."
    else:
        yield f"Calibration: {calibration.amount} of {calibration.images}, through the whole model."
        if any(target.layouts[i].on_text for i in range(len(target.layouts)) if target.converted_names(i)):
            yield "In the text model, visual and text tokens count as much in all, if its sequence has both."
        if calibration.sequences > NUM_ATTENTION_SEQUENCES:
            yield (
                f"Attention weights, by which values and keys count: measured on {NUM_ATTENTION_SEQUENCES} of the "
                "pairs, drawn by the seed."
            )
    if calibration.reason:
        yield f"Calibration text: {calibration.text}, because {calibration.reason}."
    if target.fitted and not calibration.fitted:
        yield "Output matrices are not solved for: that takes the text itself, not its moments."
    if calibration.index_steps:
        yield f"Indexers: {calibration.index_steps} steps per layer on the attention of the layer."
    elif calibration.index_heads and settings.index_steps is None:
        yield (
            "Indexers: the closed form. The forecast of training is over ten minutes on this device; give "
            "`index_steps` a number of steps to run it."
        )
    reason = calibration.refit_reason
    if calibration.steps:
        yield f"Refit: {calibration.steps} steps per layer{f', because {reason}' if reason else ''}."
    elif reason and not target.exact:
        yield f"No refit: {reason}; give `refit` a number of steps to run it."
    context = trained_length(arch, target.parent_config)
    if (
        calibration.images is None
        and arch.is_decoder
        and not target.exact
        and not settings.refits_jointly
        and context > calibration.length
    ):
        yield (
            f"Retrieval: in prompts beyond {calibration.length:,} tokens, the length of the calibration sequences, "
            "the model may not find a passage again; `refit` joint trains on longer ones. The recipe retrieval of "
            "`headwise eval` measures it."
        )


def plan_warnings(calibration: CalibrationPlan | None) -> Iterator[str]:
    """Yield a line of the plan for calibration text that the user did not choose and the parent did not write.

    Args:
        calibration: what is measured on the parent; None: nothing.
    """
    if calibration is not None and calibration.foreign:
        yield (
            f"The calibration text is foreign to the model: {FOREIGN[calibration.text]}. Text like the model's own "
            "is better: give `calibrate` a file of it."
        )
