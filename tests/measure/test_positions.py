"""Loss by position, against hand-made models."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headwise.measure import positions


class Counter(torch.nn.Module):
    """Predict the last token plus one with a high probability up to position `good`, and uniformly after it."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.good = good

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        sure = torch.nn.functional.one_hot((input_ids + 1) % 16, 16) * 5.0
        sure[:, self.good :] = 0
        return SimpleNamespace(logits=sure)


def test_loss_by_position_shows_where_a_model_breaks() -> None:
    tokens = torch.arange(400) % 16
    blocks = positions.overlapping_windows(tokens[None], length=64, stride=8)
    assert blocks.shape == (43, 64)
    curve = positions.loss_by_position(Counter(good=31), blocks, width=8)
    sure = math.log(1 + 15 * math.exp(-5.0))
    assert curve.nats[:4] == pytest.approx([sure] * 4, rel=1e-5)
    assert curve.nats[4:] == pytest.approx([math.log(16)] * 4, rel=1e-5)
    assert curve.before(32) == curve.nats[3] and curve.end == curve.nats[-1] and curve.length == 64
    with pytest.raises(ValueError, match="is not a multiple of the width 7"):
        positions.loss_by_position(Counter(31), blocks, width=7)


def test_each_token_occurs_once_in_each_interval() -> None:
    windows = positions.overlapping_windows(torch.arange(64)[None], length=16, stride=4)
    for start in range(0, 16, 4):
        seen = windows[:, start : start + 4].flatten()
        assert len(seen.unique()) == len(seen)
