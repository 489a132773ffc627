"""The characteristic function of attention distances, against random distances."""

from __future__ import annotations

import pytest
import torch

from headwise.convert.mla.features import layer_statistics, mean_phase, with_constant
from tests.convert.mla.samples import moment, random_source


def test_the_mean_phase_is_that_of_random_distances():
    """The characteristic function against a Monte Carlo estimate."""
    weights, _ = random_source(2, 1, 8, 12)
    distances = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).expand(2, -1)
    known = layer_statistics(with_constant(weights), moment(12), distances=distances)
    frequency = torch.tensor([0.3, 1.7], dtype=torch.float64)
    m = mean_phase(distances[0], frequency)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(distances[0], 200_000, replacement=True, generator=generator)
    torch.testing.assert_close(m, torch.exp(-1j * frequency[:, None] * drawn).mean(1), rtol=0.02, atol=0.01)
    assert known.distances.sum(1).tolist() == pytest.approx([1, 1])
