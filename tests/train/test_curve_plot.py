"""The picture of a training curve."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from headwise.train.curve_plot import draw_curve

HEADER = "step,tokens,seconds,loss,learning_rate,heldout,closed\n"


def test_two_points_are_no_curve(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text(HEADER + "0,0,0.0,,,3.0,\n10,100000,1.0,2.5,1e-3,2.8,\n")
    for kind in ("png", "svg"):
        (tmp_path / f"curve.{kind}").write_bytes(b"of an earlier run")
    assert not draw_curve(path, tmp_path / "curve.png", parent=2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.csv"]


@pytest.mark.parametrize("measured", [True, False])
def test_the_picture_shows_the_parent(tmp_path: Path, measured: bool) -> None:
    path = tmp_path / "curve.csv"
    lines = [f"{step},{step}00000,1.0,{3 / (1 + step)},,," for step in range(1, 30)]
    if measured:
        lines += [f"{step},{step}00000,1.0,,,{2 + 1 / (1 + step)}," for step in (0, 15, 30)]
    path.write_text(HEADER + "\n".join(lines) + "\n")
    assert draw_curve(path, tmp_path / "with.png", parent=2.0, title="A title")
    draw_curve(path, tmp_path / "without.png", title="A title")
    one, other = imread(tmp_path / "with.png"), imread(tmp_path / "without.png")
    assert one.shape == other.shape and one.std() > 0.02
    assert bool((one != other).any()) == measured
