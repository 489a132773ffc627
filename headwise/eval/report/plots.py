"""Draw the figures of long contexts as PNG and SVG: RoPE bound, loss by position, passkey grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise import pictures
from headwise.convert.positions import rope_bound
from headwise.convert.positions.context import rope_sets
from headwise.io.gguf import open_gguf
from headwise.io.source import find_folder, find_gguf, read_config
from headwise.measure.positions import PositionLoss
from headwise.models import rope
from headwise.models.architecture import find_architecture

NUM_POINTS = 2000


def plot_model_bound(
    model: str | Path, context: int, path: Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Draw the RoPE bound of a model's own frequencies; only its config.json is read.

    Args:
        model: a folder, a GGUF file, or `org/name` on the Hub.
        context: the last distance, in tokens.
        path: the PNG to write; the SVG is beside it.
        revision: branch, tag or commit of a Hub repository.
        token: token of the Hub.

    Returns:
        `path`.

    Raises:
        HeadwiseError: there is no such model, or it has no RoPE.
    """
    if (file := find_gguf(model, revision)) is not None:
        config = open_gguf(file).config
    else:
        config = read_config(find_folder(model, revision=revision, token=token, patterns=["config.json"])[0])
    architecture = find_architecture(config)
    trained = architecture.stock_config(config).max_position_embeddings
    curves = {
        rope_set.where: rope.frequencies(rope_set.parameters, rope_set.rotary_dim, trained, context)[0]
        for rope_set in rope_sets(config, architecture)
    }
    return plot_rope_bound(curves, context, path, trained)


@pictures.in_style
def plot_rope_bound(curves: Mapping[str, Tensor], length: int, path: Path, trained: int | None = None) -> Path:
    """Draw B(m) of one or more sets of frequencies (mathematics, section 5).

    Below zero a similar key at distance m has a lower score than a random key. Each point of a line is the minimum
    over an interval of distances, so that no minimum falls between two points.

    Args:
        curves: label -> radians per token, (frequencies,).
        length: the last distance, in tokens.
        path: the PNG to write; the SVG is beside it.
        trained: trained length, marked by a line.

    Returns:
        `path`.
    """
    figure = pictures.new_figure(3.2, title="RoPE bound by distance")
    axes = figure.add_subplot()
    for (label, frequencies), colour in zip(curves.items(), cycle(pictures.COLOURS), strict=False):
        values = rope_bound.similarity(frequencies, length)[1:]
        edges = torch.logspace(0, math.log10(length + 1), NUM_POINTS).round().long().unique()
        intervals = list(pairwise(edges.tolist()))
        minima = [float(values[first - 1 : after - 1].min()) for first, after in intervals]
        axes.plot([first for first, _ in intervals], minima, label=label, color=colour, linewidth=1.1)
        if (failure := rope_bound.first_failure(frequencies, length)) is not None:
            axes.plot([failure], [0], "o", color=colour, markersize=5, label=f"below 0 from {failure:,}")
    axes.axhline(0, color=pictures.INK, linewidth=0.8)
    axes.grid(axis="y")
    _mark_trained_length(axes, trained)
    axes.set_xscale("log")
    ticks = [10**power for power in range(int(math.log10(length)) + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="distance m (tokens)", ylabel="B(m) = Σ cos(m ω)")
    pictures.legend_above(axes, 3)
    return pictures.save_picture(figure, path)


@pictures.in_style
def plot_loss_by_position(curves: Mapping[str, PositionLoss], path: Path, trained: int | None = None) -> Path:
    """Draw loss by position, one line for each label.

    Args:
        curves: label -> loss by position.
        path: the PNG to write; the SVG is beside it.
        trained: trained length, marked by a line.

    Returns:
        `path`.
    """
    figure = pictures.new_figure(3.4, title="Loss by position")
    axes = figure.add_subplot()
    for (label, curve), colour in zip(curves.items(), cycle(pictures.COLOURS), strict=False):
        positions = [curve.width * (i + 0.5) for i in range(len(curve.nats))]
        axes.plot(positions, curve.nats, label=label, color=colour)
    _mark_trained_length(axes, trained)
    axes.set(xlabel="position (tokens)", ylabel="nats per token")
    axes.grid(axis="y")
    # Beyond its trained length a model can lose many nats, which would compress the other lines into one.
    lowest = min(min(curve.nats) for curve in curves.values())
    axes.set_ylim(top=min(max(max(curve.nats) for curve in curves.values()) + 0.1, lowest + 2.5))
    pictures.legend_above(axes, 5)
    return pictures.save_picture(figure, path)


@pictures.in_style
def plot_passkey_grid(grid: Mapping[tuple[int, float], float], path: Path, title: str = "Passkey") -> Path:
    """Draw the share of retrieved passkeys by length and depth.

    Args:
        grid: (length, depth) -> share, for every combination.
        path: the PNG to write; the SVG is beside it.
        title: title of the figure.

    Returns:
        `path`.
    """
    lengths = sorted({length for length, _ in grid})
    depths = sorted({depth for _, depth in grid})
    figure = pictures.new_figure(1.3 + 0.32 * len(depths), title=title, width=1.7 + 0.75 * len(lengths))
    axes = figure.add_subplot()
    values = [[grid[length, depth] for length in lengths] for depth in depths]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, line in enumerate(values):
        for column, share in enumerate(line):
            colour = "black" if share > 0.6 else "white"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="prompt (tokens)", ylabel="depth of the key")
    axes.spines["bottom"].set_visible(False)
    figure.colorbar(image, ax=axes, label="retrieved").outline.set_visible(False)
    return pictures.save_picture(figure, path)


def _mark_trained_length(axes: Any, trained: int | None) -> None:
    if trained is not None:
        axes.axvline(trained, color=pictures.MUTED, dashes=(4, 3), linewidth=0.9, label="trained length")
