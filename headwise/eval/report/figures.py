"""Draw the figures of a report, as SVG in the colours of the page and as PNG.

They are 300 points wide, so that their labels are as large as the text beside them on a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headwise import pictures
from headwise.eval.result import Comparison, Evaluation
from headwise.eval.verdict import Damage, figure_name
from headwise.format import factor, token_count
from headwise.measure.divergence import LayerError
from headwise.measure.entropy import AttentionEntropy, HeadIndex
from headwise.measure.positions import PositionLoss

FEWEST_POINTS = 3  # two points are a line that shows no course
WIDTH = 4.2  # inches of 72 points
FONT_SIZE = 10


@dataclass(frozen=True)
class Palette:
    """Colours by their use; readers who do not distinguish red and green can still distinguish child and parent."""

    ink: str = pictures.INK
    muted: str = pictures.MUTED
    line: str = pictures.PALE
    child: str = pictures.COLOURS[0]
    parent: str = pictures.BASELINE
    bad: str = "#b3341f"
    good: str = "#1f7a4d"
    paper: str = pictures.PAPER


LIGHT = Palette()
# Placeholder colours, which `render_svg` replaces by the variables of the page.
MARKED = Palette(**{field: f"#0000{number:02x}" for number, field in enumerate(vars(LIGHT), start=16)})
Draw = Callable[[Palette], Figure]


def make_drawings(evaluation: Evaluation) -> dict[str, tuple[Draw, str]]:
    """Select the figures that an evaluation has data for.

    Args:
        evaluation: the whole result.

    Returns:
        Name -> the function that draws the figure, and its caption.
    """
    drawings: dict[str, tuple[Draw, str]] = {}
    # All figures that the verdict counts.
    rows = [(c, damage) for c in evaluation.comparisons if (damage := Damage.of(c)) is not None]
    if rows:
        drawings["differences"] = (
            lambda palette: _differences(rows, evaluation.fail_above, palette),
            "Child against parent on the same samples, in points; perplexities as a ratio. Bars are 95% intervals "
            "of one figure alone. Hollow marks are differences that are not significant after Holm's correction.",
        )
    if (positions := evaluation.positions) is not None and len(positions.child.nats) >= FEWEST_POINTS:
        drawings["positions"] = (
            lambda palette: _positions(positions.child, positions.parent, positions.trained, palette),
            f"Loss by position. Each point is the mean over {positions.child.width} positions of the same text. "
            "Lower is better.",
        )
    divergence = evaluation.diagnostics
    if divergence is not None and len(divergence.layers) >= FEWEST_POINTS:
        drawings["layers"] = (
            lambda palette: _layers(divergence.layers, palette),
            "Relative error of the child's activations against the parent's, errors of earlier layers included.",
        )
    if divergence is not None and (entropy := divergence.entropy) is not None:
        drawings["entropy"] = (
            lambda palette: _entropy(entropy, palette),
            "Relative attention entropy of every head: 0 is attention to one token, 1 is uniform attention. "
            f"Marks: ▼ below {entropy.collapsed_below:g} (collapsed), ▲ above {entropy.uniform_above:g} (uniform).",
        )
    if evaluation.passkey:
        drawings["passkey"] = (
            lambda palette: _passkey(evaluation, palette),
            "Share of retrieved passkeys by length of the prompt and depth of the key.",
        )
    return drawings


def write_figure(draw: Draw, path: Path) -> None:
    """Write a figure in light colours as PNG and as SVG.

    Args:
        draw: draws the figure.
        path: the PNG; the SVG is beside it.
    """
    with pictures.picture_style(font_size=FONT_SIZE):
        pictures.save_picture(draw(LIGHT), path)


def render_svg(draw: Draw, label: str) -> str:
    """Render a figure as an SVG element with the colours and the font of the page around it.

    Args:
        draw: draws the figure.
        label: prefix of the ids in the element, unique on the page.
    """
    buffer = io.StringIO()
    # The page has its own font.
    with pictures.picture_style(font_size=FONT_SIZE, svg_fonttype="none", svg_hashsalt=label):
        draw(MARKED).savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    for side in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    for field, colour in vars(MARKED).items():
        text = text.replace(colour, f"var(--{field})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    # Every figure has ids such as axes_1, which must be unique on the page.
    text = re.sub(r'\bid="', f'id="{label}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{label}-", text)


def _figure(
    height: float, palette: Palette, columns: int = 1, rows: int = 1, **grid: Any
) -> tuple[Figure, list[Any]]:
    figure = pictures.new_figure(height, width=WIDTH, paper=palette.paper)
    subplots = figure.subplots(rows, columns, squeeze=False, **grid).flatten()
    for axes in subplots:
        axes.set_facecolor("none")
        axes.tick_params(colors=palette.muted, labelcolor=palette.ink)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=palette.line)
        axes.set_axisbelow(True)
    return figure, list(subplots)


def _differences(rows: Sequence[tuple[Comparison, Damage]], fail_above: float | None, palette: Palette) -> Figure:
    """Draw accuracies in points, and perplexities below them by their logarithm, so that a collapse has a place."""
    panels = [[row for row in rows if row[0].is_perplexity == logarithmic] for logarithmic in (False, True)]
    panels = [panel for panel in panels if panel]
    row_height = 0.3 if len(rows) <= 20 else 0.2
    heights = [len(panel) + 0.4 for panel in panels]
    figure, all_axes = _figure(
        0.55 * len(panels) + row_height * sum(heights), palette, rows=len(panels), height_ratios=heights
    )
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_differences(axes, panel, fail_above, palette)
    return figure


def _log_damage(damage: float) -> float:
    """Return the change of the loss for a relative change of the perplexity; -inf for a perplexity of 0."""
    return math.log1p(damage) if damage > -1 else -math.inf


def _draw_differences(
    axes: Any, rows: Sequence[tuple[Comparison, Damage]], fail_above: float | None, palette: Palette
) -> None:
    logarithmic = rows[0][0].is_perplexity
    unit = _log_damage if logarithmic else lambda damage: 100 * damage
    spans = [[-unit(value) for value in (damage.high, damage.value, damage.low)] for _, damage in rows]
    # A figure of one sample has no finite interval.
    limit = max(
        [abs(value) for span in spans for value in span if math.isfinite(value)] + [unit(fail_above or 0.0)]
    )
    limit = 1.15 * limit or unit(0.01)
    axes.axvline(0, color=palette.muted, linewidth=0.9)
    if fail_above is not None:
        gate = -unit(fail_above)
        axes.axvline(gate, color=palette.bad, linewidth=0.9, dashes=(3, 3))
        axes.annotate(
            "gate", (gate, 1), xycoords=("data", "axes fraction"), color=palette.bad, ha="right",
            xytext=(-3, -8), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    for place, ((comparison, damage), (low, middle, high)) in enumerate(zip(rows, spans, strict=True)):
        significant = comparison.is_significant
        colour = palette.muted if not significant else palette.bad if damage.value > 0 else palette.good
        ends = [max(low, -limit), min(high, limit)]
        axes.plot(ends, [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        face = colour if significant else palette.paper
        axes.plot(middle, place, "o", markersize=5.5, color=colour, markerfacecolor=face)
    axes.set(xlim=(-limit, limit), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [_row_label(comparison) for comparison, _ in rows])
    if logarithmic:
        axes.set_xticks(*_ratio_ticks(limit))
    axes.grid(axis="x", color=palette.line, linewidth=0.7)
    name = "perplexity" if logarithmic else "points"
    axes.set_xlabel(f"← worse\u2003{name}\u2003better →", color=palette.muted)


def _ratio_ticks(limit: float) -> tuple[list[float], list[str]]:
    """Return places and labels of an axis of perplexities from `-limit` to `limit` nats; worse is negative.

    The labels are percent up to a doubling, and ratios of child and parent beyond.
    """
    growth = math.expm1(min(limit, 700.0))
    if growth < 1:
        step = 10.0 ** math.floor(math.log10(growth))
        step *= next(multiple for multiple in (0.5, 1, 2, 5) if growth / (multiple * step) < 3)
        changes = (step * k for k in range(-2, 3) if step * k > -1)
        ticks = {-math.log1p(change): f"{100 * change:+.3g}%" for change in changes}
        ticks[0.0] = "0%"
    else:
        bases = chain((2.0, 4.0), (10.0**power for power in count(1)))
        base = next(base for base in bases if limit / math.log(base) < 3)
        ticks = {-math.log(base) * k: f"×{factor(base**k)}" for k in range(-2, 3)}
    kept = {place: label.replace("-", "−") for place, label in ticks.items() if abs(place) <= limit}
    return list(kept), list(kept.values())


def _positions(child: PositionLoss, parent: PositionLoss | None, trained: int | None, palette: Palette) -> Figure:
    figure, (axes,) = _figure(2.6, palette)
    lines = [("child", child, palette.child, 2.0)]
    if parent is not None:
        lines.insert(0, ("parent", parent, palette.parent, 1.6))
    for label, curve, colour, width in lines:
        middles = [curve.width * (number + 0.5) for number in range(len(curve.nats))]
        marker = "o" if len(middles) == 1 else None
        axes.plot(middles, curve.nats, label=label, color=colour, linewidth=width, marker=marker)
    end = child.width * len(child.nats)
    if trained is not None and trained < end:
        axes.axvline(trained, color=palette.muted, linewidth=0.9, dashes=(3, 3), label="trained length")
    axes.set_xlim(0, end)
    axes.set_xlabel("position (tokens)", color=palette.muted)
    axes.set_ylabel("nats per token", color=palette.muted)
    axes.grid(axis="y", color=palette.line, linewidth=0.7)
    _legend(axes, palette)
    return figure


def _layers(layers: Sequence[LayerError], palette: Palette) -> Figure:
    figure, (axes,) = _figure(2.6, palette)
    numbers = [layer.layer for layer in layers]
    lines = (("attention", "attention output", palette.child), ("hidden", "hidden state behind", palette.parent))
    for field, label, colour in lines:
        errors = [getattr(layer, field) for layer in layers]
        axes.plot(numbers, errors, "o-", markersize=3.5, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer", color=palette.muted)
    axes.set_ylabel("relative error", color=palette.muted)
    axes.grid(axis="y", color=palette.line, linewidth=0.7)
    _legend(axes, palette)
    return figure


def _entropy(entropy: AttentionEntropy, palette: Palette) -> Figure:
    depth, heads = len(entropy.child), len(entropy.child[0])
    height = min(5.5, max(1.9, 0.9 + 1.6 * depth / heads))
    figure, both = _figure(height, palette, columns=2, sharey=True)
    sides: Mapping[str, tuple[Any, Any, Any]] = {
        "parent": (entropy.parent, entropy.parent_collapsed, entropy.parent_uniform),
        "child": (entropy.child, entropy.collapsed, entropy.uniform),
    }
    image: Any = None
    for axes, (label, (values, collapsed, uniform)) in zip(both, sides.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        _mark(axes, collapsed, "v", "white")
        _mark(axes, uniform, "^", "black")
        axes.set_title(label, color=palette.ink, fontsize=10, loc="left")
        axes.set_xlabel("head", color=palette.muted)
        axes.spines["bottom"].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    both[0].set_ylabel("layer", color=palette.muted)
    bar = figure.colorbar(image, ax=both, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("attention entropy (0: one token, 1: uniform)", color=palette.muted)
    bar.ax.tick_params(colors=palette.muted, labelcolor=palette.ink)
    return figure


def _mark(axes: Any, heads: Sequence[HeadIndex], marker: str, colour: str) -> None:
    places = [(head.head, head.layer) for head in heads]
    if places:
        axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=4, linestyle="none")


def _passkey(evaluation: Evaluation, palette: Palette) -> Figure:
    lengths = sorted({cell.length for cell in evaluation.passkey})
    depths = sorted({cell.depth for cell in evaluation.passkey})
    sides = ["parent", "child"] if all(cell.parent is not None for cell in evaluation.passkey) else ["child"]
    figure, both = _figure(1.1 + 0.32 * len(depths), palette, columns=len(sides), sharey=True)
    for axes, side in zip(both, sides, strict=True):
        at = {(cell.length, cell.depth): getattr(cell, side) for cell in evaluation.passkey}
        values = [[at[length, depth] for length in lengths] for depth in depths]
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        for row, line in enumerate(values):
            for column, share in enumerate(line):
                colour = "black" if share > 0.6 else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(len(lengths)), [token_count(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(side, color=palette.ink, fontsize=10, loc="left")
        axes.set_xlabel("prompt (tokens)", color=palette.muted)
        axes.spines["bottom"].set_visible(False)
    both[0].set_ylabel("depth of the key", color=palette.muted)
    return figure


def _legend(axes: Any, palette: Palette) -> None:
    pictures.legend_above(axes, labelcolor=palette.ink, fontsize=9)


def _row_label(comparison: Comparison, most: int = 26) -> str:
    text = figure_name(comparison).removeprefix("headwise_")
    return text if len(text) <= most else f"{text[: most - 1]}…"
