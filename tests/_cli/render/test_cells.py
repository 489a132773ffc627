"""Cells of tables."""

from __future__ import annotations

import pytest

from headwise._cli.render.cells import format_ranges, format_saving


def test_layers_are_listed_as_ranges() -> None:
    assert format_ranges([0, 1, 2, 5]) == "0-2, 5"
    assert format_ranges(range(0, 80, 2)).startswith("40 layers: 0, 2")


@pytest.mark.parametrize(("saved", "text"), [(0.75, "75.0%"), (0.001, "0.1%"), (0.0, "none"), (-1.0, "grows 2x")])
def test_a_saving_is_a_share_or_a_factor(saved: float, text: str) -> None:
    assert format_saving(saved) == text
