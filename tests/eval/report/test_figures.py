"""The pictures of a report: every figure that the verdict counts has its row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from headwise import pictures
from headwise.eval.report import figures
from headwise.eval.report.figures import LIGHT, make_drawings
from headwise.eval.result import Comparison
from headwise.eval.verdict import Damage
from tests.eval.evaluations import accuracy, full, only, perplexity


def test_the_differences_hold_every_figure_of_the_verdict() -> None:
    """Also a perplexity that collapsed, one that is unfit, and figures that are not significant."""
    collapsed = replace(perplexity(5.9, 0.3), task="lambada", headline=False)
    unfit = replace(perplexity(0.4, 0.1), task="wiki", unfit="the parent fails")
    minor = accuracy("arc_easy", 0.44, -0.02, 0.0056, 0.2, headline=False, metric="acc")
    evaluation = replace(
        only(*full().comparisons, collapsed, unfit, minor, perplexity(math.log(1.4), 0.1)), fail_above=0.01
    )
    draw, _ = make_drawings(evaluation)["differences"]
    with pictures.picture_style():
        figure = draw(LIGHT)
        labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
        ticks = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    counted = [c for c in evaluation.comparisons if Damage.of(c) is not None]
    assert len(labels) == len(counted) == len(evaluation.comparisons)
    assert {"lambada perplexity", "wiki perplexity", "arc_easy acc"} <= set(labels)
    assert {"×1", "×100"} <= set(ticks)
    # The mark of the collapsed text is where the axis has its ratio.
    axes = figure.axes[-1]
    row = [label.get_text() for label in axes.get_yticklabels()].index("lambada perplexity")
    (mark,) = [line for line in axes.lines if line.get_marker() == "o" and list(line.get_ydata()) == [row]]
    assert list(mark.get_xdata()) == pytest.approx([-5.9]) and axes.get_xlim()[0] < -5.9


@pytest.mark.parametrize(
    ("nats", "ticks"),
    [
        (0.0, {"0%"}),
        (0.003, {"+0.2%", "−0.2%"}),
        (0.1, {"+10%"}),
        (1.0, {"×2", "×0.5"}),
        (7.0, {"×100", "×0.01"}),
        (1.5, {"×4"}),
        (300.0, {"×1"}),
    ],
)
def test_the_ratio_of_perplexities_has_readable_ticks(nats: float, ticks: set[str]) -> None:
    draw, _ = make_drawings(only(perplexity(nats, 0.0)))["differences"]
    with pictures.picture_style():
        (axes,) = draw(LIGHT).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks <= set(labels) and 1 <= len(labels) <= 5


@pytest.mark.parametrize(
    "single",
    [accuracy("one_question", 1.0, -1.0, math.inf, 1.0), perplexity(0.1, math.inf), perplexity(0.1, 800.0)],
)
def test_an_infinite_interval_is_drawn_to_the_edge(single: Comparison) -> None:
    assert single.paired is not None
    if not math.isfinite(single.paired.standard_error or 0.0):
        single = replace(single, paired=replace(single.paired, low=-math.inf, high=math.inf))
    draw, _ = make_drawings(only(single))["differences"]
    with pictures.picture_style():
        (axes,) = draw(LIGHT).axes
    assert all(math.isfinite(x) for line in axes.lines for x in line.get_xdata())


@pytest.mark.parametrize("limit", [1e-9, 0.01, 0.3, 0.6253, 0.69, 0.7, 3.0, 900.0])
def test_ticks_of_a_ratio_axis_lie_on_it(limit: float) -> None:
    places, labels = figures._ratio_ticks(limit)
    assert 0.0 in places and len(places) == len(labels) == len(set(labels)) >= 2
    assert all(abs(place) <= limit for place in places)
