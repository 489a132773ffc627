"""Draw the figures of long contexts as PNG files: RoPE bound, loss by position, passkey grid.

The figures use no window system and no global state of matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from headwise.convert.positions import rope_bound
from headwise.convert.positions.context import rope_sets
from headwise.io.gguf import open_gguf
from headwise.io.source import find_folder, find_gguf, read_config
from headwise.io.workdir import write_file_atomically
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
        path: the PNG to write.
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


def plot_rope_bound(curves: Mapping[str, Tensor], length: int, path: Path, trained: int | None = None) -> Path:
    """Draw B(m) of one or more sets of frequencies (mathematics, section 5).

    Below zero a similar key at distance m has a lower score than a random key. Each point of a line is the minimum
    over an interval of distances, so that no minimum falls between two points.

    Args:
        curves: label -> radians per token, (frequencies,).
        length: the last distance, in tokens.
        path: the PNG to write.
        trained: trained length, marked by a line.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, frequencies in curves.items():
        values = rope_bound.similarity(frequencies, length)[1:]
        edges = torch.logspace(0, math.log10(length + 1), NUM_POINTS).round().long().unique()
        intervals = list(pairwise(edges.tolist()))
        minima = [float(values[first - 1 : after - 1].min()) for first, after in intervals]
        (line,) = axes.plot([first for first, _ in intervals], minima, label=label, linewidth=1)
        if (failure := rope_bound.first_failure(frequencies, length)) is not None:
            axes.plot([failure], [0], "o", color=line.get_color(), label=f"below 0 from {failure:,}")
    axes.axhline(0, color="black", linewidth=0.8)
    _mark_trained_length(axes, trained)
    axes.set_xscale("log")
    axes.set(xlabel="distance m (tokens)", ylabel="B(m) = Σ cos(m ω)", title="RoPE bound by distance")
    axes.legend()
    return _save(figure, path)


def plot_loss_by_position(curves: Mapping[str, PositionLoss], path: Path, trained: int | None = None) -> Path:
    """Draw loss by position, one line for each label.

    Args:
        curves: label -> loss by position.
        path: the PNG to write.
        trained: trained length, marked by a line.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, curve in curves.items():
        positions = [curve.width * (i + 0.5) for i in range(len(curve.nats))]
        axes.plot(positions, curve.nats, label=label, linewidth=1.4)
    _mark_trained_length(axes, trained)
    axes.set(xlabel="position (tokens)", ylabel="nats per token", title="Loss by position")
    # Beyond its trained length a model can lose many nats, which would compress the other lines into one.
    lowest = min(min(curve.nats) for curve in curves.values())
    axes.set_ylim(top=min(max(max(curve.nats) for curve in curves.values()) + 0.1, lowest + 2.5))
    axes.legend()
    return _save(figure, path)


def plot_passkey_grid(grid: Mapping[tuple[int, float], float], path: Path, title: str = "Passkey") -> Path:
    """Draw the share of retrieved passkeys by length and depth.

    Args:
        grid: (length, depth) -> share, for every combination.
        path: the PNG to write.
        title: title of the figure.

    Returns:
        `path`.
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


def _mark_trained_length(axes: Any, trained: int | None) -> None:
    if trained is not None:
        axes.axvline(trained, color="grey", linestyle="--", linewidth=0.8, label="trained length")


def _save(figure: Figure, path: Path) -> Path:
    kind = path.suffix.lstrip(".") or "png"
    write_file_atomically(path, lambda to: figure.savefig(to, dpi=120, format=kind))
    return path
