"""The picture of the demo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from headwise.demo.picture import COLOURS, Measurement, _apart, _round_numbers, draw_costs

PARENT = Measurement("MHA", "", 8192, 2.148, 0.0)
MEASURED = [
    Measurement(target, method, cache, nats, 0.0)
    for method, row in {
        "mean": (4.896, 7.586, 9.325),
        "optimal": (2.309, 2.975, 4.345),
        "uptrained": (2.14, 2.15, 2.2),
    }.items()
    for target, cache, nats in zip(("GQA-4", "GQA-2", "MQA"), (4096, 2048, 1024), row, strict=True)
]


def test_the_picture_shows_every_method_on_white(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    draw_costs(PARENT, MEASURED, picture, title="What it costs", ylabel="nats per token")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] >= 600 and (pixels[0, 0] == 1).all()
    for colour in COLOURS[:3]:
        assert (np.abs(pixels - to_rgb(colour)).max(-1) < 0.02).sum() > 1000, colour
    assert (np.abs(pixels - to_rgb(COLOURS[3])).max(-1) < 0.02).sum() == 0


def test_labels_are_pushed_apart_and_keep_their_order() -> None:
    assert _apart({"b": 0.02, "a": 0.0, "c": 1.0}, 0.1) == pytest.approx({"a": 0.0, "b": 0.1, "c": 1.0})


def test_ticks_are_round_and_not_crowded() -> None:
    def height(nats: float) -> float:
        return float(np.sqrt(nats - 2.148))

    ticks = _round_numbers(height, 2.148, 9.7, 0.19)
    assert ticks[0] == 2.2 and 2.148 not in ticks and {3, 4, 5} <= set(ticks)
    assert min(np.diff([height(tick) for tick in ticks])) >= 0.19
