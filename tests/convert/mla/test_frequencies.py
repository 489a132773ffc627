"""The choice of rotary frequencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.convert.mla.features import layer_statistics, with_constant
from headwise.convert.mla.frequencies import free_frequencies, partial_frequencies, plane_norms, rotary_gains
from headwise.models import deepseek
from tests.convert.devices import META, SHAPES, sample_layer
from tests.reference import frequencies as plane_frequencies

THETA = 100.0


def test_free_frequencies_follow_the_largest_losses():
    frequencies = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    gains = torch.tensor([[5.0, 4.0], [9.0, 0.1], [0.2, 0.0]])
    assert free_frequencies(frequencies, gains, 6).tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("choice", "kept"), [("high", [0, 1]), ("low", [2, 3]), ("uniform", [0, 2]), ("norm", [1, 3])]
)
def test_partial_frequencies(choice, kept):
    frequencies = deepseek.default_grid(THETA, 8)
    norms = torch.tensor([1.0, 5.0, 2.0, 3.0])
    got = partial_frequencies(frequencies, 3, 12, choice, norms)
    assert got.tolist() == frequencies[kept].repeat_interleave(3).tolist()
    with pytest.raises(ValueError, match="multiple of 6"):
        partial_frequencies(frequencies, 3, 8, choice, norms)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_choice_of_frequencies_creates_no_tensor_on_another_device(shape: Any) -> None:
    weights = sample_layer(shape)
    own, groups = plane_frequencies(weights.layout.rotary_dim), weights.layout.num_key_value_heads
    whole = weights if weights.has_bias else with_constant(weights)
    with META:
        statistics = layer_statistics(whole)
        free_frequencies(own, rotary_gains(whole, own, statistics), 8).tolist()
        norms = plane_norms(whole, statistics)
        for kept in ("high", "low", "uniform", "norm"):
            partial_frequencies(own, groups, 2 * groups, kept, norms).tolist()
