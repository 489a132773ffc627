"""Pictures: two files of one name, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import rcParams

from headwise import pictures
from headwise.errors import HeadwiseError


@pictures.in_style
def draw(path: Path, title: str = "Loss") -> Path:
    figure = pictures.new_figure(2, title=title)
    axes = figure.add_subplot()
    axes.plot([1, 2, 3], [3, 1, 2], label="child")
    pictures.legend_above(axes)
    return pictures.save_picture(figure, path)


def test_a_picture_is_a_png_and_an_svg_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a.png"), draw(tmp_path / "b.svg")
    assert [path.name for path in (first, second)] == ["a.png", "b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    for kind, begins in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        content = first.with_suffix(kind).read_bytes()
        assert content.startswith(begins) and content == second.with_suffix(kind).read_bytes()
    assert b"<dc:date>" not in first.with_suffix(".svg").read_bytes()
    other = draw(tmp_path / "c.png", title="Other").with_suffix(".svg").read_bytes()
    assert other != first.with_suffix(".svg").read_bytes()


def test_the_style_does_not_leak(tmp_path: Path) -> None:
    before = rcParams["font.size"]
    draw(tmp_path / "a.png")
    assert rcParams["font.size"] == before != pictures.STYLE["font.size"]


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"x\.doc does not end with \.png or \.svg"):
        draw(tmp_path / "x.doc")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"none/x\.png cannot be written: No such file"):
        draw(tmp_path / "none" / "x.png")
