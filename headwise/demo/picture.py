"""Draw the picture of the demo: loss against cache size, one line per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwise import pictures
from headwise.format import size
from headwise.pictures import INK

# The first method is the baseline.
COLOURS = (pictures.BASELINE, *pictures.COLOURS)


@dataclass(frozen=True)
class Measurement:
    """The cache and the loss of one model.

    Attributes:
        target: attention layout, such as GQA-4.
        method: of the conversion.
        cache_bytes: KV cache, bytes per token.
        nats: loss on held-out text, nats per token.
        seconds: of the conversion and the measurement.
    """

    target: str
    method: str
    cache_bytes: int
    nats: float
    seconds: float


@pictures.in_style
def draw_costs(
    parent: Measurement, measured: Sequence[Measurement], path: Path, *, title: str, ylabel: str
) -> None:
    """Draw a PNG and an SVG: nats per token (lower is better) against cache bytes per token (logarithmic).

    The loss has a square-root scale from the parent up, because methods differ by two orders of magnitude.

    Args:
        parent: the unconverted model, drawn as a level line.
        measured: the converted models; those of one method are joined, methods keep the order of appearance.
        path: where the PNG goes; the SVG is beside it.
        title: the sentence above.
        ylabel: the label of the loss axis.
    """
    figure = pictures.new_figure(3.7, title=title)
    axes = figure.add_subplot()
    least = min(point.cache_bytes for point in measured)
    shrinkage = least / parent.cache_bytes

    def height(nats: Any) -> Any:
        return np.sign(nats - parent.nats) * np.sqrt(np.abs(nats - parent.nats))

    def nats_at(height: Any) -> Any:
        return parent.nats + np.sign(height) * height**2

    axes.set_yscale("function", functions=(height, nats_at))
    axes.set_xscale("log", base=2)
    axes.set_xlim(least * shrinkage**0.5, parent.cache_bytes * shrinkage**-0.02)
    heights = [0.0, *(height(point.nats) for point in measured)]
    span = max(heights) - min(heights) or 1.0
    top = max(heights) + 0.05 * span
    axes.set_ylim(nats_at(min(heights) - 0.12 * span), nats_at(top))

    axes.plot([least, parent.cache_bytes], [parent.nats] * 2, color=INK, linewidth=1.2, dashes=(5, 4))
    axes.plot(parent.cache_bytes, parent.nats, color=INK, marker="o", markersize=4.5)
    text_style: dict[str, Any] = {"fontsize": 8.5, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.0}}
    axes.annotate(
        f"parent  {parent.nats:.2f}",
        (parent.cache_bytes, parent.nats),
        xytext=(0, -7),
        textcoords="offset points",
        ha="right",
        va="top",
        color=INK,
        **text_style,
    )
    lines = _lines(measured)
    labels = _apart({method: height(points[0].nats) for method, points in lines.items()}, 0.055 * span)
    for place, (method, points) in enumerate(lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        xs, ys = [p.cache_bytes for p in points], [p.nats for p in points]
        axes.plot(
            xs, ys, color=colour, linewidth=1.6, marker="o", markersize=4.5, markeredgecolor="white", zorder=3
        )
        label = least * shrinkage**0.025, nats_at(labels[method])
        if xs[0] > least:  # a dotted line joins the label to a line that begins further right
            axes.plot([least, xs[0]], [label[1], ys[0]], color=colour, linewidth=1.2, dashes=(1, 2.5), zorder=2)
        axes.annotate(
            f"{method}  {ys[0]:.2f}",
            label,
            ha="right",
            va="center",
            color=colour,
            fontweight="bold",
            **text_style,
        )

    _name_sizes(axes, parent, measured)
    nats = _round_numbers(height, parent.nats, nats_at(top), 0.07 * span)
    axes.set_yticks(nats, [f"{n:g}" for n in nats])
    axes.set_ylabel(f"{ylabel}\n(square-root scale from the parent up)")
    axes.set_xlabel("KV cache per token")
    axes.grid(axis="y")
    pictures.save_picture(figure, path)


def _lines(measured: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Return the measurements of each method, smallest cache first."""
    methods = dict.fromkeys(point.method for point in measured)
    return {
        method: sorted((p for p in measured if p.method == method), key=lambda p: p.cache_bytes)
        for method in methods
    }


def _name_sizes(axes: Any, parent: Measurement, measured: Sequence[Measurement]) -> None:
    """Label each cache size with its layout; of two labels that would overlap, the first stays."""
    names: dict[int, str] = {}
    for point in (parent, *measured):
        if all(max(point.cache_bytes, other) > 1.5 * min(point.cache_bytes, other) for other in names):
            exact = point.cache_bytes < 20_000
            amount = f"{point.cache_bytes:,} B" if exact else size(point.cache_bytes)
            names[point.cache_bytes] = f"{point.target}\n{amount}"
    axes.set_xticks(list(names), list(names.values()))
    axes.set_xticks([], minor=True)


def _round_numbers(height: Any, low: float, high: float, gap: float) -> list[float]:
    """Return numbers above `low` up to `high` for the ticks, roundest first, at heights `gap` apart."""
    ticks = [low]
    for step, end in ((1, high), (0.5, low + 5), (0.1, low + 1), (0.05, low + 0.5), (0.01, low + 0.1)):
        for number in np.arange(np.ceil(low / step) * step, min(high, end), step):
            if all(abs(height(number) - height(other)) >= gap for other in ticks):
                ticks.append(round(float(number), 2))
    return sorted(ticks[1:])


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return the heights, moved up until no two are nearer than `gap`."""
    placed: dict[str, float] = {}
    floor = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max(height, floor)
        floor = placed[name] + gap
    return placed
