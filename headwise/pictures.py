"""The style of all pictures, and the one way to write them: a PNG and an SVG of the same name.

A picture is as wide as the text of a paper, where its labels have the size of a caption. The same data give the
same bytes: the SVG has no date and no random ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from headwise.errors import HeadwiseError
from headwise.io.fs import os_errors
from headwise.io.workdir import write_file_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

WIDTH = 5.5  # inches
DOTS_PER_INCH = 200
INK, MUTED, PALE, PAPER = "#1f2430", "#6b7280", "#e3e5e9", "#ffffff"
# A baseline, such as the parent, is grey. The other colours are distinct without red and green.
BASELINE = "#8a8f98"
COLOURS = ("#0b62a4", "#c77700", "#009e73", "#cc79a7", "#7a5195", "#56b4e9", "#a6761d", "#1f2430")
STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "headwise",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


@contextmanager
def picture_style(**more: Any) -> Iterator[None]:
    """Draw in the style of this module.

    Args:
        **more: further settings of matplotlib, with underscores in place of dots.
    """
    from matplotlib import rc_context

    settings: Any = {**STYLE, **{name.replace("_", "."): value for name, value in more.items()}}
    with rc_context(settings):
        yield


def in_style(draw: Callable[P, T]) -> Callable[P, T]:
    """Return a function that draws in the style of this module.

    Args:
        draw: draws and saves a picture.
    """

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with picture_style():
            return draw(*args, **kwargs)

    return styled


def new_figure(height: float, *, title: str = "", width: float = WIDTH, paper: str = PAPER) -> Figure:
    """Return an empty figure, which needs no window system and no global state of matplotlib.

    Args:
        height: inches.
        title: the sentence above; empty: none.
        width: inches.
        paper: the background.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=paper)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def legend_above(axes: Any, columns: int = 4, **more: Any) -> None:
    """Put the legend of axes above them, where no line runs.

    Args:
        axes: of a figure.
        columns: entries side by side.
        **more: as `Axes.legend`.
    """
    options: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "borderaxespad": 0.3,
        "columnspacing": 1.4,
    }
    axes.legend(ncols=columns, **{**options, **more})


def save_picture(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and as SVG, under one name.

    Args:
        figure: in the style of this module.
        path: of either file.

    Returns:
        The path of the PNG.

    Raises:
        HeadwiseError: the path ends with another suffix.
        DiskError: a file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise HeadwiseError(f"{path} does not end with .png or .svg, as pictures do.")
    png, svg = picture_files(path)
    # Without the metadata that differ from run to run, or from version to version.
    with os_errors(png):
        write_file_atomically(
            png, lambda to: figure.savefig(to, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        )
        write_file_atomically(
            svg, lambda to: figure.savefig(to, format="svg", metadata={"Date": None, "Creator": None})
        )
    return png


def picture_files(path: Path) -> tuple[Path, Path]:
    """Return the PNG and the SVG of a picture.

    Args:
        path: of either.
    """
    return path.with_suffix(".png"), path.with_suffix(".svg")
