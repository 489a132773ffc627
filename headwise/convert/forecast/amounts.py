"""Choose the amount of calibration text and the steps of a refit, where the settings name none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headwise.convert.forecast.stage_seconds import CALIBRATION_LENGTH, indexer_seconds, refit_seconds
from headwise.convert.refit.regression import DEFAULT_STEPS
from headwise.convert.settings import JOINT_REFITS
from headwise.convert.sparse.warm_up import INDEX_STEPS
from headwise.format import duration
from headwise.io.reader import Checkpoint
from headwise.models.protocol import AttentionModel

# Tokens for the closed forms, for a refit of each layer, which learns from every one of them, and for closed forms
# before a joint refit, which samples far more text anyway. On a CPU, where a refit reads fewer of them, the least
# amount of text that is sampled.
CLOSED_FORM_TOKENS, REFIT_TOKENS, TOKENS_BEFORE_JOINT = 32_768, 196_608, 98_304
REFIT_TOKENS_ON_CPU = 65_536
# The least amount of calibration text that is chosen.
FEWEST_TOKENS = 4096
# Numbers of hidden states kept in memory for calibration at most: 512 MiB in float32.
HIDDEN_NUMBERS = 1 << 27
# "auto" takes the most steps whose forecast is below this; none where the fewest are not. A CPU gets less, so that
# a small model is converted within a minute.
REFIT_SECONDS, REFIT_SECONDS_ON_CPU = 600.0, 25.0
STEPS_TO_TRY = (DEFAULT_STEPS, 200, 100)


def trained_length(arch: AttentionModel, config: dict[str, Any]) -> int:
    """Return the context of a config in tokens; 2048 where the config class has none.

    Args:
        arch: the architecture of the source.
        config: its config.json, or one with other positions.
    """
    length = getattr(arch.stock_config(config), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else 2048


def calibration_length(trains_indexers: bool, *, exact: bool) -> int:
    """Return the longest calibration sequence.

    Args:
        trains_indexers: whether indexers are trained, which need distant keys.
        exact: whether the layers are converted without moments of attention, which take memory of length squared.
    """
    return (4 if exact else 2) * CALIBRATION_LENGTH if trains_indexers else CALIBRATION_LENGTH


def calibration_tokens(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    steps: int,
    device: torch.device,
    *,
    joint: bool = False,
    index_steps: int = 0,
) -> int:
    """Return the number of calibration tokens where the settings name none.

    Args:
        checkpoint: the source.
        arch: its architecture.
        steps: of regression for every layer; 0: none.
        device: where the layers run.
        joint: whether a joint refit follows.
        index_steps: of training for every indexer; 0: none.
    """
    width = arch.stock_config(checkpoint.config).hidden_size
    most = TOKENS_BEFORE_JOINT if joint or index_steps else CLOSED_FORM_TOKENS
    if steps:
        most = REFIT_TOKENS_ON_CPU if device.type == "cpu" and not index_steps else REFIT_TOKENS
    tokens: int = max(FEWEST_TOKENS, min(most, HIDDEN_NUMBERS // width))
    return tokens


@dataclass(frozen=True)
class RefitChoice:
    """The regression of every layer.

    Attributes:
        steps: of each layer; 0: none.
        reason: why "auto" chose them, as the end of a sentence; None if the settings gave them.
    """

    steps: int
    reason: str | None = None


def choose_refit(
    checkpoint: Checkpoint, arch: AttentionModel, target: Any, refit: str | int, length: int, device: torch.device
) -> RefitChoice:
    """Decide the steps of regression per layer: the given number, or for "auto" the most that are short enough.

    Published baselines are compared as published, so "auto" trains only after calibrated methods.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        refit: the value of the setting `refit`.
        length: tokens in a calibration sequence.
        device: where the layers are trained.
    """
    if isinstance(refit, int):
        return RefitChoice(refit)
    if refit == "layers":
        return RefitChoice(DEFAULT_STEPS)
    if refit in ("off", *JOINT_REFITS) or not target.calibrated:
        return RefitChoice(0)
    limit = REFIT_SECONDS_ON_CPU if device.type == "cpu" else REFIT_SECONDS
    each = refit_seconds(checkpoint, arch, target, 1, length, device)
    steps = next((steps for steps in STEPS_TO_TRY if steps * each <= limit), 0)
    least = steps or STEPS_TO_TRY[-1]
    words = f"{'they' if steps else f'{least} steps per layer'} are forecast at {duration(least * each)}"
    return RefitChoice(steps, f"{words}, {'within' if steps else 'over'} the limit of {duration(limit)}")


def choose_index_steps(
    arch: AttentionModel, target: Any, steps: int | None, length: int, device: torch.device
) -> int:
    """Return the steps of training for every indexer: the given number, or the default if it is short enough.

    Args:
        arch: the architecture of the source.
        target: the decided conversion.
        steps: the value of the setting `index_steps`.
        length: tokens in a calibration sequence.
        device: where the indexers are trained.
    """
    if steps is not None:
        return steps
    return INDEX_STEPS if indexer_seconds(arch, target, INDEX_STEPS, length, device) <= REFIT_SECONDS else 0
