"""Draw the curve of a training run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from headwise.io.workdir import write_file_atomically

INK, PALE, HELDOUT, TRAINING = "#1f2937", "#e5e7eb", "#0072b2", "#8a8a8a"


FEWEST_POINTS = 3  # two points are a line that shows no course


def draw_curve(curve: Path, path: Path, *, parent: float | None = None, title: str = "") -> bool:
    """Draw a PNG of a curve.csv: the held-out loss with the parent's as a line, and the training loss below.

    Args:
        curve: as `callbacks.CurveCallback` writes it.
        path: where the PNG goes.
        parent: the parent's nats per token on the same held-out text.
        title: the sentence above.

    Returns:
        Whether a picture was drawn: a curve of fewer than three points is left out.
    """
    heldout, training = (_column(curve, name) for name in ("heldout", "loss"))
    curves = (("held-out", heldout), ("training", training))
    shown = [(name, points) for name, points in curves if len(points) >= FEWEST_POINTS]
    if not shown:
        path.unlink(missing_ok=True)
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [3, 2][: len(shown)] or [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axes, (name, points) in zip(panels, shown, strict=False):
        measured = name == "held-out"
        xs, ys = zip(*points, strict=True)
        style = {"marker": "o", "markersize": 4, "linewidth": 2.2} if measured else {"linewidth": 1.2}
        axes.plot(xs, ys, color=HELDOUT if measured else TRAINING, **style)
        axes.set_ylabel("held-out nats per token" if measured else "training loss", color=INK)
        if measured and parent is not None:
            axes.axhline(parent, color=INK, linewidth=1.2, dashes=(5, 4))
        if measured:
            _label_lines(axes, points, parent)
        _style_axes(axes)
    panels[0].set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)
    panels[-1].set_xlabel("tokens (millions)", color=INK)
    write_file_atomically(path, lambda to: figure.savefig(to, format="png"))
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
        # The lines may be close: one label is above its line, the other below.
        above = value == upper
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


def _style_axes(axes: Any) -> None:
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
