"""Choose the layers of a sparse model that keep an indexer; the others share the one before them.

The choice is greedy and needs no training: of all layers, the one whose indexer is missed least, by the loss of the
whole model on text, gives its indexer up; then the next one (IndexCache, Bai et al. 2026, arXiv 2603.12201).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from headwise.convert.calibration.corpus import read_corpus
from headwise.convert.calibration.loss_text import Unmeasured, plan_loss_text
from headwise.convert.settings import AUTO_LAYERS, ConvertSettings
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import Checkpoint
from headwise.measure.shared_indexers import loss_with_shared
from headwise.models.protocol import AttentionModel
from headwise.models.stock import load_model
from headwise.progress import Progress
from headwise.schema import restore

# Tokens in one forward pass at most, where more than one sequence fits.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class SharingChoice:
    """The layers that keep an indexer, and the measured loss.

    All losses are differences from the source's, in nats per token, on tokens beyond the budget of keys.

    Attributes:
        asked: the value of the setting.
        layers: that keep an indexer.
        num_layers: of the model.
        budget: keys that a query attends to.
        limit: of the loss, for `auto`; None: the settings give the number of layers.
        text: on which losses are measured, as `calibrate` names it.
        sequences: of the text.
        length: tokens in a sequence.
        tokens: predicted tokens beyond the budget.
        source: nats per token of the source.
        loss: of all sharing together.
        given_up: layers that gave their indexers up, in this order.
        losses: after each of them.
    """

    asked: str
    layers: tuple[int, ...]
    num_layers: int
    budget: int
    limit: float | None
    text: str
    sequences: int
    length: int
    tokens: int
    source: float
    loss: float
    given_up: tuple[int, ...]
    losses: tuple[float, ...]

    def notes(self) -> Iterator[str]:
        """Yield the lines of the plan about the choice and its loss."""
        yield (
            f"Indexers in {len(self.layers)} of {self.num_layers} layers ({', '.join(map(str, self.layers))}); the "
            f"others share the one before them: {self.loss:+.4f} nats per token on {self.tokens:,} tokens beyond "
            f"the budget ({self.text}, sequences of {self.length:,})."
        )
        if self.given_up:
            steps = (f"{layer}: {nats:+.4f}" for layer, nats in zip(self.given_up, self.losses, strict=True))
            yield f"Layers that give their indexers up in turn, and the loss after each: {', '.join(steps)}."

    def resolved(self, settings: ConvertSettings) -> ConvertSettings:
        """Return settings that give the number of indexers, so that they repeat the conversion.

        Args:
            settings: of the conversion.
        """
        return replace(settings, index_layers=len(self.layers), index_loss=None)

    def recorded(self) -> dict[str, Any]:
        """Return what the record holds of the choice, by its key."""
        # Lists, as JSON returns them: a resumed run compares both.
        return {"indexers": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}


def choose_sharing(
    checkpoint: Checkpoint,
    model: AttentionModel,
    settings: ConvertSettings,
    device: torch.device,
    progress: Progress,
    earlier: Mapping[str, Any] | None = None,
) -> SharingChoice | None:
    """Measure the loss of sharing indexers, and choose the layers that keep theirs.

    The source runs whole. A layer that gives its indexer up attends to the keys that the last indexer before it
    selects.

    Args:
        checkpoint: the source, with an indexer in every layer.
        model: its stock class.
        settings: of the conversion.
        device: where the source runs.
        progress: receives a stage that counts passes over the text.
        earlier: what an interrupted run recorded of its choice; None: nothing.

    Returns:
        The choice; None if the settings share no indexers.

    Raises:
        SettingError: there are fewer layers, or nothing can be measured.
        HeadwiseError: the text cannot be read, or a loss is not finite.
    """
    if settings.index_layers is None:
        return None
    layouts = model.layouts(checkpoint.config)
    count, indexer = len(layouts), layouts[0].indexer
    assert indexer is not None  # `check_source` refused the others
    auto = settings.index_layers == AUTO_LAYERS
    least = 1 if auto else int(settings.index_layers)
    if least > count:
        raise SettingError(
            "index_layers",
            f"`index_layers` is {least}, and the model has {count} layers.",
            "Give a smaller number.",
        )
    limit, asked = settings.index_loss if auto else None, str(settings.index_layers)
    if earlier and (earlier.get("asked"), earlier.get("limit")) == (asked, limit):
        with suppress(TypeError):  # changed by hand: it is measured again
            return restore(SharingChoice, dict(earlier))
    # With n indexers left, n - 1 passes leave out one each: the first layer keeps its own.
    passes, index_passes = 1 + sum(range(least, count)), count + sum(n**2 for n in range(least, count))
    budget = indexer.index_topk
    text = plan_loss_text(
        checkpoint,
        model,
        settings,
        "shared indexers",
        budget,
        passes,
        device,
        needed=True,
        index_passes=index_passes,
    )
    if isinstance(text, Unmeasured):
        raise SettingError(
            "index_layers", f"`index_layers` measures losses, and {text.reason}.", "Convert without it."
        )
    blocks = read_corpus(checkpoint, text, device, progress)[0]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = load_model(checkpoint, model.auto_class, dtype, device).eval()
    paths = [model.attention_path(layer) for layer in range(count)]
    progress.stage("Measuring shared indexers", total=passes, unit="passes")

    def nats(own: list[int]) -> float:
        rows = max(1, TOKENS_AT_ONCE // text.length)
        measured = loss_with_shared(network, blocks, budget, paths, own, batch_size=rows).nats
        progress.advance(1)
        if not math.isfinite(measured):
            raise HeadwiseError(
                f"The loss of {checkpoint.source} on {text.text} is not finite, so that no indexer can be missed.",
                "Give `calibrate` another text.",
            )
        return measured

    own, losses, given_up = list(range(count)), list[float](), list[int]()
    before = nats(own)
    while len(own) > least:
        options = {layer: nats([each for each in own if each != layer]) - before for layer in own[1:]}
        layer = min(options, key=lambda each: options[each])
        if limit is not None and options[layer] > limit:
            break
        own.remove(layer)
        given_up.append(layer)
        losses.append(options[layer])
    return SharingChoice(
        asked=asked,
        layers=tuple(own),
        num_layers=count,
        budget=budget,
        limit=limit,
        text=text.text,
        sequences=len(blocks),
        length=text.length,
        tokens=len(blocks) * (text.length - 1 - budget),
        source=before,
        loss=losses[-1] if losses else 0.0,
        given_up=tuple(given_up),
        losses=tuple(losses),
    )
