"""Measure what a sliding window costs each layer of the parent, and choose the layers that get one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from headwise.convert.calibration.corpus import read_corpus
from headwise.convert.calibration.loss_text import Unmeasured, plan_loss_text
from headwise.convert.positions.moved import with_context
from headwise.convert.positions.windows import format_layers, parse_layers, require_choice, with_window
from headwise.convert.settings import AUTO_LAYERS, ConvertSettings
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import Checkpoint
from headwise.io.tokenizer import tokenizer_kind
from headwise.measure.window_loss import loss_beyond
from headwise.models.architecture import find_architecture
from headwise.models.layout import text_layouts
from headwise.models.protocol import AttentionModel
from headwise.models.stock import load_model
from headwise.progress import Progress
from headwise.schema import restore
from headwise.serving.engines import engine_verdicts, require_engines

# Tokens at the start of a text that StreamingLLM (arXiv 2309.17453) keeps as attention sinks.
FIRST = 4
# Nats per token from which the loss of windows that the user chose is a warning.
NOTABLE = 0.1


@dataclass(frozen=True)
class WindowChoice:
    """The layers that get a sliding window, and the measured loss.

    All losses are differences from the parent's, in nats per token, on tokens behind the window.

    Attributes:
        window: in tokens.
        asked: the choice of layers in the settings.
        layers: that get the window.
        num_layers: of the model.
        limit: of the loss, for `auto`; None: the settings name the layers.
        text: on which losses are measured, as `calibrate` names it.
        sequences: of the text.
        length: tokens in a sequence.
        tokens: predicted tokens behind the window.
        parent: nats per token of the parent.
        loss: of all windows together.
        layer_loss: of the window in one layer alone; None for a layer that was not measured.
        first: tokens at the start of a text that no window hides, in `first_loss`.
        first_loss: of all windows together if they kept these tokens; None where the class has learned sinks.
    """

    window: int
    asked: str
    layers: tuple[int, ...]
    num_layers: int
    limit: float | None
    text: str
    sequences: int
    length: int
    tokens: int
    parent: float
    loss: float
    layer_loss: tuple[float | None, ...]
    first: int
    first_loss: float | None

    def notes(self) -> Iterator[str]:
        """Yield the lines of the plan about the choice and its loss."""
        yield (
            f"Window of {self.window:,} tokens in {len(self.layers)} of {self.num_layers} layers: "
            f"{self.loss:+.4f} nats per token on {self.tokens:,} tokens behind the window ({self.text}, sequences "
            f"of {self.length:,})."
        )
        if self.limit is not None:
            full = [layer for layer in range(self.num_layers) if layer not in self.layers]
            kept = f"layers {format_layers(full)}, where the window costs most" if full else "no layer"
            yield f"Full attention stays in {kept}: all windows together may cost {self.limit} nats."
            losses = ((i, nats) for i, nats in enumerate(self.layer_loss) if nats is not None)
            yield f"Loss of the window in one layer alone: {', '.join(f'{i}: {nats:+.4f}' for i, nats in losses)}."
        if self.first_loss is None:
            yield "Attention sinks: the class has learned ones, which stay in every layer."
        else:
            yield (
                f"Attention sinks: the stock class has none. If these layers also kept the first {self.first} "
                f"tokens, the loss would be {self.first_loss:+.4f}: the missing sinks cost "
                f"{self.loss - self.first_loss:+.4f} nats per token."
            )

    def warnings(self) -> Iterator[str]:
        """Yield a line of the plan for windows that the user chose and that cost much."""
        if self.limit is None and self.loss >= NOTABLE:
            yield (
                f"The windows cost {self.loss:.2f} nats per token: give a longer `sliding_window` or fewer "
                "`window_layers`."
            )

    def resolved(self, settings: ConvertSettings) -> ConvertSettings:
        """Return settings that name the chosen layers, so that they repeat the conversion without a measurement.

        Args:
            settings: of the conversion.
        """
        if self.limit is None:
            return settings
        return replace(settings, window_layers=format_layers(self.layers), window_loss=None)


def choose_windows(
    checkpoint: Checkpoint,
    model: AttentionModel,
    settings: ConvertSettings,
    device: torch.device,
    progress: Progress,
    earlier: Mapping[str, Any] | None = None,
) -> WindowChoice | Unmeasured | None:
    """Measure the loss of the windows that the settings set, and choose their layers where the settings do not.

    The parent runs whole, with the context of the settings. Under `auto` the window is given to one layer at a
    time. The layers are then ordered by loss, and as many as possible get the window: the loss of all windows
    together, measured again at every step of a bisection, stays within `window_loss`.

    Args:
        checkpoint: the source.
        model: its stock class.
        settings: of the conversion.
        device: where the parent runs.
        progress: receives a stage that counts passes over the text.
        earlier: what an interrupted run recorded of its choice; None: nothing.

    Returns:
        The choice; None if no window is set.

    Raises:
        SettingError: no stock class holds the choice, nothing can be measured, or no window is within the limit.
        HeadwiseError: the text cannot be read.
    """
    if not settings.sliding_window or not model.is_decoder:
        return None
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    window, asked = settings.sliding_window, settings.window_layers or "all"
    config = with_context(arch.with_groups(checkpoint.config, {}), arch, settings)[0]
    layouts = text_layouts(arch.layouts(config))
    present = [layer for layer, layout in enumerate(layouts) if layout.sliding_window]
    auto = asked == AUTO_LAYERS
    if auto:
        require_choice(config, arch)
        candidates = [layer for layer in range(len(layouts)) if layer not in present]
        if not candidates:
            raise SettingError(
                "window_layers",
                "every layer of this model has a window already; `window_layers` auto chooses among the others.",
                "Give `window_layers` all.",
            )
    else:
        candidates, present = [], parse_layers(asked, len(layouts))
    windowed = with_window(config, arch, window, format_layers(sorted({*present, *candidates[:1]})))
    if settings.engines:  # class and window alone may rule out an engine, before minutes of measuring
        tokenizer = tokenizer_kind(checkpoint.folder)
        verdicts = engine_verdicts(windowed, window=True, tokenizer=tokenizer, engines=settings.engines)
        require_engines(verdicts, settings.engines)
    limit = settings.window_loss if auto else None
    if earlier and (earlier.get("window"), earlier.get("asked"), earlier.get("limit")) == (window, asked, limit):
        with suppress(TypeError):  # changed by hand: it is measured again
            return restore(WindowChoice, dict(earlier))
    parent = replace(checkpoint, config=config)
    passes = _passes(len(candidates))
    text = plan_loss_text(parent, arch, settings, "windows", window, passes, device, needed=auto)
    if isinstance(text, Unmeasured):
        if auto:
            raise SettingError(
                "window_layers", f"`window_layers` auto measures losses, and {text.reason}.", "Name the layers."
            )
        return text
    try:
        blocks = read_corpus(checkpoint, text, device, progress)[0]
    except HeadwiseError as error:
        if auto or settings.calibrate:
            raise
        return Unmeasured("windows", f"the text cannot be read ({str(error).rstrip('.')})")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = load_model(parent, arch.auto_class, dtype, device).eval()
    progress.stage("Measuring windows", total=_passes(len(candidates)), unit="passes")

    def nats(layers: Sequence[int], first: int = 0) -> float:
        paths = [arch.attention_path(layer) for layer in layers]
        measured = loss_beyond(network, blocks, window, paths, first=first).nats
        progress.advance(1)
        if not math.isfinite(measured):
            raise HeadwiseError(
                f"The loss of {checkpoint.source} on {text.text} is not finite, so that no window can be measured.",
                "Give `calibrate` another text, or none with layers that you name.",
            )
        return measured

    before = nats([])
    alone = {layer: nats([*present, layer]) - before for layer in candidates}
    order = sorted(alone, key=lambda layer: alone[layer])
    losses: dict[int, float] = {}

    def together(count: int) -> float:
        if count not in losses:
            losses[count] = nats([*present, *order[:count]]) - before
        return losses[count]

    count = _largest_within(together, len(order), limit) if limit is not None else 0
    if auto and not count:
        raise SettingError(
            "window_loss",
            f"a window of {window} tokens costs {together(1):.4f} nats per token in layer {order[0]}, where it "
            f"costs least, and `window_loss` is {limit}.",
            "Give a longer `sliding_window` or a larger `window_loss`.",
        )
    chosen = sorted([*present, *order[:count]])
    return WindowChoice(
        window=window,
        asked=asked,
        layers=tuple(chosen),
        num_layers=len(layouts),
        limit=limit,
        text=text.text,
        sequences=len(blocks),
        length=text.length,
        tokens=len(blocks) * (text.length - 1 - window),
        parent=before,
        loss=together(count),
        layer_loss=tuple(alone.get(layer) for layer in range(len(layouts))),
        first=FIRST,
        first_loss=None if arch.sinks else nats(chosen, FIRST) - before,
    )


def recorded_choice(choice: WindowChoice | Unmeasured | None) -> dict[str, Any]:
    """Return what the record holds of a choice, by its key; nothing if no loss was measured.

    Args:
        choice: the result of `choose_windows`.
    """
    if not isinstance(choice, WindowChoice):
        return {}
    # Lists, as JSON returns them: a resumed run compares both.
    return {"windows": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(choice).items()}}


def _largest_within(loss: Callable[[int], float], most: int, limit: float) -> int:
    """Return the largest count whose loss is within a limit, for a loss that rises with the count; 0: none."""
    if loss(most) <= limit:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if loss(middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def _passes(candidates: int) -> int:
    """Return the passes over the text: the parent, the candidates, the bisection, and the first tokens."""
    return 3 + candidates + candidates.bit_length()
