"""The picture of a training curve."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from headwise.train.curve_plot import draw_curve

HEADER = "step,tokens,seconds,loss,learning_rate,heldout,closed\n"


@pytest.mark.parametrize("measured", [True, False])
def test_the_picture_shows_the_parent(tmp_path: Path, measured: bool) -> None:
    path = tmp_path / "curve.csv"
    lines = [f"{step},{step}00000,1.0,{3 / (1 + step)},,," for step in range(1, 30)]
    if measured:
        lines += [f"{step},{step}00000,1.0,,,{2 + 1 / (1 + step)}," for step in (0, 15, 30)]
    path.write_text(HEADER + "\n".join(lines) + "\n")
    draw_curve(path, tmp_path / "with.png", parent=2.0, title="A title")
    draw_curve(path, tmp_path / "without.png", title="A title")
    one, other = imread(tmp_path / "with.png"), imread(tmp_path / "without.png")
    assert one.shape == other.shape and one.std() > 0.02
    assert bool((one != other).any()) == measured
