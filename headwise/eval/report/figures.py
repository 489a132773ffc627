"""The figures of a report, drawn once and written twice: as SVG in the page's own colours, and as PNG.

They are 300 points wide, so that their words are as large as the text beside them on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from headwise.eval.report.summary import significant
from headwise.eval.result import Comparison, Curve, Evaluation, Head
from headwise.eval.verdict import Damage, is_perplexity, name

WIDTH = 4.2  # inches of 72 points
STYLE: Any = {
    "font.size": 10,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Palette:
    """Colours by what they are for. Child and parent are told apart also without seeing red from green."""

    ink: str = "#1f2430"
    muted: str = "#6b7280"
    line: str = "#e3e5e9"
    child: str = "#0b62a4"
    parent: str = "#8a8f98"
    bad: str = "#b3341f"
    good: str = "#1f7a4d"
    paper: str = "#ffffff"


LIGHT = Palette()
# Colours that mean nothing, to be found again in the SVG and replaced by the page's variables.
MARKED = Palette(**{field: f"#0000{number:02x}" for number, field in enumerate(vars(LIGHT), start=16)})
Draw = Callable[[Palette], Figure]


def drawings(found: Evaluation) -> dict[str, tuple[Draw, str]]:
    """Name -> how to draw it, and its caption; only what the evaluation has data for."""
    made: dict[str, tuple[Draw, str]] = {}
    rows = [(one, damage) for one in found.headlines if (damage := Damage.of(one)) is not None and _scaled(one)]
    if rows:
        made["differences"] = (
            lambda palette: _differences(rows, found.fail_above, palette),
            "Child against parent on the same samples, in points, for perplexities in percent. Bars are 95% "
            "intervals; hollow marks are differences that chance explains, after Holm's correction.",
        )
    if (places := found.positions) is not None:
        made["positions"] = (
            lambda palette: _positions(places.child, places.parent, places.trained, palette),
            f"Loss by position, each point the mean over {places.child.width} positions of the same text. "
            "Lower is better.",
        )
    seen = found.diagnostics
    if seen is not None and seen.layers:
        made["layers"] = (
            lambda palette: _layers(seen.layers, palette),
            "Distance of the child's activations from the parent's, relative to their size. Errors of earlier "
            "layers are in it.",
        )
    if seen is not None and (entropy := seen.entropy) is not None:
        made["entropy"] = (
            lambda palette: _entropy(entropy, palette),
            "Attention entropy of every head as a share of the most it can be: 0 looks at one token, 1 at all "
            f"alike. Marked: below {entropy.collapsed_below:g} (▼, collapsed) and above "
            f"{entropy.uniform_above:g} (▲, uniform).",
        )
    if found.passkey:
        made["passkey"] = (
            lambda palette: _passkey(found, palette),
            "Share of passkeys found, by length of the text and depth of the key in it.",
        )
    return made


def png(draw: Draw, path: Path) -> None:
    """Write a figure in light colours."""
    with rc_context(STYLE):
        draw(LIGHT).savefig(path, dpi=160)


def svg(draw: Draw, label: str) -> str:
    """A figure as an SVG element that takes its colours and its font from the page around it."""
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": label}):
        draw(MARKED).savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    for side in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    for field, colour in vars(MARKED).items():
        text = text.replace(colour, f"var(--{field})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    # Ids are of one page now, on which every figure has its own axes_1.
    text = re.sub(r'\bid="', f'id="{label}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{label}-", text)


def _scaled(one: Comparison) -> bool:
    assert one.parent is not None
    return is_perplexity(one) or all(0 <= score.value <= 1 for score in (one.child, one.parent))


def _figure(height: float, palette: Palette, columns: int = 1, **grid: Any) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=palette.paper)
    FigureCanvasAgg(figure)
    made = figure.subplots(1, columns, squeeze=False, **grid)[0]
    for axes in made:
        axes.set_facecolor("none")
        axes.tick_params(colors=palette.muted, labelcolor=palette.ink)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=palette.line)
        axes.set_axisbelow(True)
    return figure, list(made)


def _differences(rows: Sequence[tuple[Comparison, Damage]], fail_above: float | None, palette: Palette) -> Figure:
    figure, (axes,) = _figure(0.9 + 0.3 * len(rows), palette)
    axes.axvline(0, color=palette.muted, linewidth=0.9)
    if fail_above is not None:
        axes.axvline(-100 * fail_above, color=palette.bad, linewidth=0.9, dashes=(3, 3))
        axes.annotate(
            "gate", (-100 * fail_above, 1), xycoords=("data", "axes fraction"), color=palette.bad, ha="right",
            xytext=(-3, -8), textcoords="offset points", fontsize=9,
        )  # fmt: skip
    for place, (one, damage) in enumerate(rows):
        real = significant(one)
        colour = palette.muted if not real else palette.bad if damage.value > 0 else palette.good
        low, middle, high = (-100 * value for value in (damage.high, damage.value, damage.low))
        axes.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        face = colour if real else palette.paper
        axes.plot(middle, place, "o", markersize=5.5, color=colour, markerfacecolor=face)
    reach = max(max(abs(damage.low), abs(damage.high)) for _, damage in rows) * 100 or 1.0
    reach = 1.15 * max(reach, 100 * (fail_above or 0))
    axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [_short(name(one)) for one, _ in rows])
    axes.grid(axis="x", color=palette.line, linewidth=0.7)
    axes.set_xlabel("← worse\u2003\u2003better →", color=palette.muted)
    return figure


def _positions(child: Curve, parent: Curve | None, trained: int | None, palette: Palette) -> Figure:
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


def _layers(layers: Sequence[Any], palette: Palette) -> Figure:
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


def _entropy(entropy: Any, palette: Palette) -> Figure:
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


def _mark(axes: Any, heads: Sequence[Head], marker: str, colour: str) -> None:
    places = [(head.head, head.layer) for head in heads]
    if places:
        axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=4, linestyle="none")


def _passkey(found: Evaluation, palette: Palette) -> Figure:
    lengths = sorted({cell.length for cell in found.passkey})
    depths = sorted({cell.depth for cell in found.passkey})
    sides = ["parent", "child"] if all(cell.parent is not None for cell in found.passkey) else ["child"]
    figure, both = _figure(1.1 + 0.32 * len(depths), palette, columns=len(sides), sharey=True)
    for axes, side in zip(both, sides, strict=True):
        at = {(cell.length, cell.depth): getattr(cell, side) for cell in found.passkey}
        values = [[at[length, depth] for length in lengths] for depth in depths]
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        for row, line in enumerate(values):
            for column, share in enumerate(line):
                colour = "black" if share > 0.6 else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(len(lengths)), [_thousands(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(side, color=palette.ink, fontsize=10, loc="left")
        axes.set_xlabel("text (tokens)", color=palette.muted)
        axes.spines["bottom"].set_visible(False)
    both[0].set_ylabel("depth of the key", color=palette.muted)
    return figure


def _legend(axes: Any, palette: Palette) -> None:
    axes.legend(frameon=False, labelcolor=palette.ink, fontsize=9, handlelength=1.4)


def _short(text: str, most: int = 20) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _thousands(number: int) -> str:
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"
