"""Figures of long contexts are written as PNG and SVG files."""

from __future__ import annotations

from pathlib import Path

from headwise.eval.report import plots
from headwise.measure.positions import PositionLoss
from headwise.models import rope


def test_figures_are_written(tmp_path: Path) -> None:
    curves = {"base 10,000": rope.base_frequencies(1e4, 64)}
    losses = {"plain": PositionLoss((2.0, 2.1, 9.0), 8, 100)}
    made = [
        plots.plot_rope_bound(curves, 100_000, tmp_path / "bound.png", trained=1024),
        plots.plot_loss_by_position(losses, tmp_path / "loss.png", trained=16),
        plots.plot_passkey_grid({(512, 0.0): 1.0, (512, 1.0): 0.5}, tmp_path / "passkey.png"),
    ]
    for path in made:
        assert path.with_suffix(".svg").read_bytes().startswith(b"<?xml")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
