"""Draw the figures of a report, as SVG in the colours of the page and as PNG.

They are 300 points wide, so that their labels are as large as the text beside them on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headwise import pictures
from headwise.eval.result import Comparison, Evaluation
from headwise.eval.verdict import Damage, figure_name
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
    shown = [c for c in evaluation.comparisons if c.headline or c.is_significant]
    rows = [(c, damage) for c in shown if (damage := Damage.of(c)) is not None and _has_scale(c)]
    if rows:
        drawings["differences"] = (
            lambda palette: _differences(rows, evaluation.fail_above, palette),
            "Child against parent on the same samples, in points, for perplexities in percent. Bars are 95% "
            "intervals; hollow marks are differences that are not significant after Holm's correction. A "
            "perplexity that at least doubles is in the table only.",
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


def _has_scale(comparison: Comparison) -> bool:
    """Return whether a figure can be drawn in points or percent: a perplexity that doubles would hide the rest."""
    if comparison.damage is not None and comparison.damage >= 1:
        return False
    assert comparison.parent is not None
    scores = (comparison.child, comparison.parent)
    return comparison.is_perplexity or all(0 <= score.value <= 1 for score in scores)


def _figure(height: float, palette: Palette, columns: int = 1, **grid: Any) -> tuple[Figure, list[Any]]:
    figure = pictures.new_figure(height, width=WIDTH, paper=palette.paper)
    subplots = figure.subplots(1, columns, squeeze=False, **grid)[0]
    for axes in subplots:
        axes.set_facecolor("none")
        axes.tick_params(colors=palette.muted, labelcolor=palette.ink)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=palette.line)
        axes.set_axisbelow(True)
    return figure, list(subplots)


def _differences(rows: Sequence[tuple[Comparison, Damage]], fail_above: float | None, palette: Palette) -> Figure:
    figure, (axes,) = _figure(0.9 + 0.3 * len(rows), palette)
    axes.axvline(0, color=palette.muted, linewidth=0.9)
    if fail_above is not None:
        axes.axvline(-100 * fail_above, color=palette.bad, linewidth=0.9, dashes=(3, 3))
        axes.annotate(
            "gate", (-100 * fail_above, 1), xycoords=("data", "axes fraction"), color=palette.bad, ha="right",
            xytext=(-3, -8), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    for place, (comparison, damage) in enumerate(rows):
        significant = comparison.is_significant
        colour = palette.muted if not significant else palette.bad if damage.value > 0 else palette.good
        low, middle, high = (-100 * value for value in (damage.high, damage.value, damage.low))
        axes.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        face = colour if significant else palette.paper
        axes.plot(middle, place, "o", markersize=5.5, color=colour, markerfacecolor=face)
    limit = max(max(abs(damage.low), abs(damage.high)) for _, damage in rows) * 100 or 1.0
    limit = 1.15 * max(limit, 100 * (fail_above or 0))
    axes.set(xlim=(-limit, limit), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [_row_label(comparison) for comparison, _ in rows])
    axes.grid(axis="x", color=palette.line, linewidth=0.7)
    axes.set_xlabel("← worse\u2003\u2003better →", color=palette.muted)
    return figure


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
        axes.set_xticks(range(len(lengths)), [_thousands(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(side, color=palette.ink, fontsize=10, loc="left")
        axes.set_xlabel("prompt (tokens)", color=palette.muted)
        axes.spines["bottom"].set_visible(False)
    both[0].set_ylabel("depth of the key", color=palette.muted)
    return figure


def _legend(axes: Any, palette: Palette) -> None:
    pictures.legend_above(axes, labelcolor=palette.ink, fontsize=9)


def _row_label(comparison: Comparison, most: int = 22) -> str:
    """Return the name of a figure; a further metric of a task has its own name, under that of the task."""
    is_other_metric = not (comparison.headline or comparison.group)
    text = comparison.metric.replace("_", " ") if is_other_metric else figure_name(comparison)
    text = text.removeprefix("headwise_")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _thousands(number: int) -> str:
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"
