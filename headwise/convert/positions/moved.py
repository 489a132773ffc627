"""Apply the settings of positions to a model's config: the longer context first, then the window."""

from __future__ import annotations

from typing import Any

from headwise.convert.positions.context import extend_context
from headwise.convert.positions.windows import with_window
from headwise.convert.settings import ConvertSettings
from headwise.models.architecture import Architecture

# The settings that act on positions.
POSITION_SETTINGS = ("context", "rope", "rope_theta", "sliding_window", "window_layers")


def with_positions(
    config: dict[str, Any], architecture: Architecture, settings: ConvertSettings
) -> tuple[dict[str, Any], list[str]]:
    """Return a config with the context and the window of some settings, and lines for the plan.

    Args:
        config: the source's config.json.
        architecture: its row. The config that is returned may be of another row.
        settings: of the conversion; without `context` and `sliding_window` the positions stay.

    Raises:
        HeadwiseError: no stock class can express the positions.
    """
    config, notes = with_context(config, architecture, settings)
    if settings.sliding_window is not None:
        window, layers = settings.sliding_window or None, settings.window_layers or "all"
        config = with_window(config, architecture, window, layers)
    return config, notes


def with_context(
    config: dict[str, Any], architecture: Architecture, settings: ConvertSettings
) -> tuple[dict[str, Any], list[str]]:
    """Return a config with the context of some settings, and lines for the plan; its windows stay.

    Args:
        config: the source's config.json.
        architecture: its row.
        settings: of the conversion; without `context` the config is returned as it is.

    Raises:
        HeadwiseError: no stock class can express the positions.
    """
    if settings.context is None:
        return config, []
    return extend_context(
        config,
        architecture,
        context=settings.context,
        rule=settings.rope or "auto",
        rope_theta=settings.rope_theta,
    )
