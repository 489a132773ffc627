"""Figures of long contexts, as PNG files. No window system and no global state of matplotlib is involved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from headwise.convert.positions import rope_bound as bound
from headwise.convert.positions.context import rotations
from headwise.io.source import find_folder, read_config
from headwise.measure.positions import PositionLoss
from headwise.models import rope
from headwise.models.architecture import find

POINTS = 2000


def draw_reach(
    model: str | Path, context: int, path: Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """`bound_curve` of a model's own frequencies, up to `context` tokens; only its config.json is read.

    Raises:
        HeadwiseError: there is no such model, or it has no RoPE.
    """
    config = read_config(find_folder(model, revision=revision, token=token, patterns=["config.json"])[0])
    arch = find(config)
    trained = arch.stock_config(config).max_position_embeddings
    curves = {
        rotation.where: rope.frequencies(rotation.parameters, rotation.rotary_dim, trained, context)[0]
        for rotation in rotations(config, arch)
    }
    return bound_curve(curves, context, path, trained)


def bound_curve(curves: Mapping[str, Tensor], length: int, path: Path, trained: int | None = None) -> Path:
    """B(m) of one or more sets of frequencies; below zero a near key no longer wins over a random one.

    Each point of the line is the lowest value of a stretch of distances, so that no dip is lost between points.

    Args:
        curves: label -> radians per token, (planes,).
        length: the last distance.
        path: the PNG to write.
        trained: marks the trained length.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, frequencies in curves.items():
        values = bound.similarity(frequencies, length)[1:]
        edges = torch.logspace(0, math.log10(length + 1), POINTS).round().long().unique()
        stretches = list(pairwise(edges.tolist()))
        lowest = [float(values[first - 1 : after - 1].min()) for first, after in stretches]
        distances = [first for first, _ in stretches]
        (line,) = axes.plot(distances, lowest, label=label, linewidth=1)
        if (failure := bound.first_failure(frequencies, length)) is not None:
            axes.plot([failure], [0], "o", color=line.get_color(), label=f"fails from {failure:,}")
    axes.axhline(0, color="black", linewidth=0.8)
    _mark(axes, trained)
    axes.set_xscale("log")
    axes.set(xlabel="distance m (tokens)", ylabel="B(m) = Σ cos(m ω)", title="How far the base reaches")
    axes.legend()
    return _save(figure, path)


def loss_curves(curves: Mapping[str, PositionLoss], path: Path, trained: int | None = None) -> Path:
    """Loss by position, one line for each label."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, curve in curves.items():
        positions = [curve.width * (i + 0.5) for i in range(len(curve.nats))]
        axes.plot(positions, curve.nats, label=label, linewidth=1.4)
    _mark(axes, trained)
    axes.set(xlabel="position (tokens)", ylabel="nats per token", title="Loss by position")
    # A model beyond its length can be many nats off: the lines that work must stay apart.
    lowest = min(min(curve.nats) for curve in curves.values())
    axes.set_ylim(top=min(max(max(curve.nats) for curve in curves.values()) + 0.1, lowest + 2.5))
    axes.legend()
    return _save(figure, path)


def passkey_grid(grid: Mapping[tuple[int, float], float], path: Path, title: str = "Passkey") -> Path:
    """Share of keys retrieved, length across and depth down.

    Args:
        grid: (length, depth) -> share, every combination present.
        path: the PNG to write.
        title: above the figure.
    """
    lengths = sorted({length for length, _ in grid})
    depths = sorted({depth for _, depth in grid})
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 1.4 + 0.5 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    values = [[grid[length, depth] for length in lengths] for depth in depths]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, line in enumerate(values):
        for column, share in enumerate(line):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="prompt (tokens)", ylabel="depth of the key", title=title)
    figure.colorbar(image, ax=axes, label="retrieved")
    return _save(figure, path)


def _mark(axes, trained: int | None) -> None:
    if trained is not None:
        axes.axvline(trained, color="grey", linestyle="--", linewidth=0.8, label="trained length")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
