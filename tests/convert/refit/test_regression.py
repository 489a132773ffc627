"""The regression of one layer on its parent's output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.refit import regression
from headwise.convert.refit.regression import peak_rate, refit


class Scale(nn.Module):
    """The smallest attention there is, to know what a refit must find."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((4,), factor), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.factor * hidden_states


def test_a_refit_finds_the_parent_where_it_can_be_reached() -> None:
    inputs = torch.randn(20, 6, 4, generator=torch.Generator().manual_seed(0))
    record = LayerRecord(0, torch.eye(5), inputs=inputs, outputs=2 * inputs)
    module = Scale(1.0)
    found = refit(module, [module.factor], record, steps=200)
    assert found.before == pytest.approx(0.25) and found.kept and found.after < 1e-4
    assert float((module.factor - 2).abs().max()) < 0.02 and not module.factor.requires_grad


class Product(nn.Module):
    """A matrix in place of an attention."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.weight


def product(error: float) -> tuple[Product, LayerRecord]:
    """Return a layer that misses its parent's output by a relative error, and the record of the parent."""
    generator = torch.Generator().manual_seed(0)
    inputs, parent = torch.randn(20, 30, 24, generator=generator), torch.randn(24, 24, generator=generator)
    noise = torch.randn(24, 24, generator=generator)
    record = LayerRecord(0, torch.eye(25), inputs=inputs, outputs=inputs @ parent)
    return Product(parent + error**0.5 * noise), record


def test_a_good_closed_form_becomes_better() -> None:
    module, record = product(0.001)
    found = refit(module, [module.weight], record, steps=20)
    assert found.kept and found.after < 0.8 * found.before


def test_steps_begin_anew_from_the_closed_form_where_the_error_rose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "peak_rate", lambda *given: 0.3)
    module, record = product(0.001)
    closed, losses, runs = module.weight.clone(), [], []

    def schedule(step: int, steps: int) -> float:
        if step == 0:
            assert torch.equal(module.weight, closed)
            runs.append(steps)
        return regression_schedule(step, steps)

    regression_schedule = regression.schedule
    monkeypatch.setattr(regression, "schedule", schedule)
    found = refit(module, [module.weight], record, steps=60, tick=losses.append)
    assert found.kept and len(losses) == found.steps == 60
    assert found.restarts == len(runs) - 1 >= 1 and runs == [60 - 6 * i for i in range(len(runs))]


def test_a_run_that_is_lost_leaves_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "peak_rate", lambda *given: 1e38)  # not a number after the first steps
    module, record = product(0.001)
    closed = module.weight.clone()
    found = refit(module, [module.weight], record, steps=50)
    assert not found.kept and found.restarts == 5 and torch.equal(module.weight, closed)


@pytest.mark.parametrize(("steps", "checks"), [(50, 5), (100, 5), (15, 3), (1, 0)])
def test_the_error_is_measured_in_the_first_half(steps: int, checks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, measure = [], regression.output_error
    monkeypatch.setattr(regression, "output_error", lambda *given: calls.append(1) or measure(*given))
    module, record = product(0.001)
    refit(module, [module.weight], record, steps=steps)
    assert len(calls) == checks + 2


def test_the_peak_rate_follows_the_error_and_the_steps() -> None:
    assert peak_rate(0.5, 300) == peak_rate(0.9, 900) == 0.1
    assert peak_rate(0.1, 300) == pytest.approx(0.035)
    assert peak_rate(0.1, 75) == pytest.approx(0.0175)
    assert peak_rate(0.0, 300) == 0.005
