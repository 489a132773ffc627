"""The time of sampling, which a forecast measures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headwise.text import sampled


@pytest.mark.parametrize(
    ("runs", "seconds"), [((9.0, 1.0, 5.0), 4.0), ((9.0, 3.0, 2.0), 2.0), ((0.0, 1.0, 9.0), 8.0)]
)
def test_a_slow_first_run_does_not_make_sampling_free(
    monkeypatch: pytest.MonkeyPatch, runs: tuple[float, ...], seconds: float
) -> None:
    """A slow run of one step made the difference negative, and the forecast that of products alone."""
    model: Any = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]))
    monkeypatch.setattr(sampled, "_batch_size", lambda *_: 8)
    monkeypatch.setattr(sampled, "start_token", lambda _: 0)
    now, costs = [0.0], iter(runs)
    monkeypatch.setattr(sampled, "_sample_batch", lambda *_: now.__setitem__(0, now[0] + next(costs)))
    each = sampled.seconds_per_token(model, None, sequences=4, length=16, clock=lambda: now[0])
    assert each == seconds / (sampled.TIMED * 4)
