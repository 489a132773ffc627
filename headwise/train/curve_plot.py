"""Draw the curve of a training run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from headwise import pictures
from headwise.pictures import BASELINE, INK

HELDOUT = pictures.COLOURS[0]

FEWEST_POINTS = 3  # two points are a line that shows no course


@pictures.in_style
def draw_curve(curve: Path, path: Path, *, parent: float | None = None, title: str = "") -> bool:
    """Draw a curve.csv as PNG and SVG: the held-out loss with the parent's as a line, and the training loss below.

    Args:
        curve: as `callbacks.CurveCallback` writes it.
        path: where the PNG goes; the SVG is beside it.
        parent: the parent's nats per token on the same held-out text.
        title: the sentence above.

    Returns:
        Whether a picture was drawn: a curve of fewer than three points is left out.
    """
    heldout, training = (_column(curve, name) for name in ("heldout", "loss"))
    curves = (("held-out", heldout), ("training", training))
    shown = [(name, points) for name, points in curves if len(points) >= FEWEST_POINTS]
    if not shown:
        for file in pictures.picture_files(path):
            file.unlink(missing_ok=True)
        return False
    figure: Any = pictures.new_figure(3.7, title=title)
    figure.get_layout_engine().set(hspace=0.08)
    ratios = [3, 2][: len(shown)] or [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axes, (name, points) in zip(panels, shown, strict=False):
        measured = name == "held-out"
        xs, ys = zip(*points, strict=True)
        style = {"marker": "o", "markersize": 3} if measured else {"linewidth": 0.9}
        axes.plot(xs, ys, color=HELDOUT if measured else BASELINE, **style)
        axes.set_ylabel("held-out nats per token" if measured else "training loss")
        if measured and parent is not None:
            axes.axhline(parent, color=INK, linewidth=1, dashes=(5, 4))
        if measured:
            _label_lines(axes, points, parent)
        axes.grid(axis="y")
    panels[-1].set_xlabel("tokens (millions)")
    pictures.save_picture(figure, path)
    return True


def _column(curve: Path, name: str) -> list[tuple[float, float]]:
    """Return (tokens in millions, value) of every row that has a value."""
    with curve.open(newline="", encoding="utf-8") as file:
        return [(float(row["tokens"]) / 1e6, float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def _label_lines(axes: Any, points: list[tuple[float, float]], parent: float | None) -> None:
    """Label the lines at the right edge."""
    last = points[-1][1]
    labels = [(last, f"this model  {last:.4f}", HELDOUT)]
    if parent is not None:
        labels.append((parent, f"parent  {parent:.4f}", INK))
    upper = max(value for value, _, _ in labels)
    for value, text, colour in labels:
        # The lines may be close: one label is above its line, the other below. A label alone is below its curve,
        # which falls.
        above = parent is not None and value == upper
        axes.annotate(
            text,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color=colour,
            fontweight="bold",
        )
    axes.margins(y=0.16)
