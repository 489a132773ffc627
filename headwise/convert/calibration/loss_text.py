"""Choose the text on which a change of the parent is measured before the plan is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.corpus import BUILTIN, LOSS_SECONDS, fits_whole
from headwise.convert.forecast.stage_seconds import forward_seconds, index_score_seconds
from headwise.convert.settings import DEFAULT_TEXT, ConvertSettings
from headwise.format import duration
from headwise.io.reader import Checkpoint
from headwise.io.tokenizer import tokenizer_kind
from headwise.models.protocol import AttentionModel

# A text has as many tokens as this number of windows, so that most queries have lost most of the text.
WINDOWS = 4
# Tokens of the text: at most, where the forecast of the time allows; and at least, in sequences.
TOKENS, SEQUENCES = 32_768, 2


@dataclass(frozen=True)
class Unmeasured:
    """A change whose loss is not measured.

    Attributes:
        what: the change, such as "windows".
        reason: why.
    """

    what: str
    reason: str

    def notes(self) -> Iterator[str]:
        """Yield the line of the plan."""
        yield f"The loss of the {self.what} is not measured: {self.reason}."

    def warnings(self) -> Iterator[str]:
        """Yield nothing."""
        yield from ()


def plan_loss_text(
    parent: Checkpoint,
    model: AttentionModel,
    settings: ConvertSettings,
    what: str,
    keys: int,
    passes: int,
    device: torch.device,
    *,
    needed: bool,
    index_passes: int = 0,
) -> CalibrationPlan | Unmeasured:
    """Return the text that losses are measured on, or why none is measured.

    Args:
        parent: the source, with the context of the settings.
        model: its stock class.
        settings: of the conversion.
        what: the change, such as "windows", for the message.
        keys: that a changed query attends to; predictions beyond them count.
        passes: of the model over the text.
        device: where it runs.
        needed: whether the conversion needs the loss, however long it takes.
        index_passes: of single indexers over the text, in all passes of the model together.
    """
    length = min(WINDOWS * keys, model.stock_config(parent.config).max_position_embeddings)
    if settings.calibrate == "none":
        return Unmeasured(what, "`calibrate` is none")
    if model.auto_class != "AutoModelForCausalLM":
        return Unmeasured(what, f"{model.auto_class} reads more than text")
    if parent.headless:
        return Unmeasured(what, "the model has no language-model head")
    if tokenizer_kind(parent.folder) == "none":
        return Unmeasured(what, "the model has no tokenizer")
    if settings.allow_nan:
        return Unmeasured(what, "the weights may hold NaN")
    if length < keys + 2:
        return Unmeasured(what, f"no text is longer than {keys} tokens: the context is {length} tokens")
    if not fits_whole(parent, device):
        return Unmeasured(what, "the whole parent does not fit into the free memory")
    sequence = passes * forward_seconds(parent, length, device, length)
    if index_passes:
        shape = next(layout.indexer for layout in model.layouts(parent.config) if layout.indexer)
        sequence += index_passes * index_score_seconds(shape, length, device)
    sequences = max(SEQUENCES, min(TOKENS // length, int(LOSS_SECONDS / max(sequence, 1e-9))))
    if not needed and sequences * sequence > LOSS_SECONDS:
        return Unmeasured(
            what, f"the forecast is {duration(sequences * sequence)}, and the limit is {duration(LOSS_SECONDS)}"
        )
    text = settings.calibrate or DEFAULT_TEXT
    text = BUILTIN if text == DEFAULT_TEXT else text
    return CalibrationPlan(text, sequences, length, 0, settings.seed, least=SEQUENCES)
