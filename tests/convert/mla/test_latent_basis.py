"""The basis of the latent: the same function, equal elements, and the least expected cost of rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headwise.convert.mla.latent_basis import (
    RIDGE,
    balanced_basis,
    flat_rotation,
    rounding_cost,
    unit_rotary_key,
)
from headwise.kernels.decode.latent_fp8 import dequantize_latent, quantize_latent
from headwise.models.layout import LatentWeights
from tests.convert.mla.samples import approximate, moment, random_source, run_latent, tokens


def sample(bias: bool = False, rank: int = 24) -> LatentWeights:
    weights, _ = random_source(6, 3, 8, 40, bias=bias)
    return approximate(weights, _, rank, 8, num_iterations=2)[0]


def costs(latent: LatentWeights, inputs: Tensor) -> Tensor:
    """Cost of a relative error in each element of the latent: its energy times its weight."""
    energy = (latent.kv_down @ inputs @ latent.kv_down.T).diagonal()
    return energy * rounding_cost(latent, inputs).diagonal()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("rank", [24, 64])
def test_the_layer_computes_the_same(bias: bool, calibrated: bool, rank: int) -> None:
    """A rank of 64 is larger than the number of inputs: the latent then has rows of zeros."""
    latent = sample(bias, rank)
    x = tokens(40, bias)
    inputs = moment(40)[: x.shape[1], : x.shape[1]] if calibrated else None
    balanced = balanced_basis(latent, inputs)
    assert balanced.layout == latent.layout
    assert (balanced.kv_down - latent.kv_down).norm() > 0.1 * latent.kv_down.norm()
    torch.testing.assert_close(run_latent(balanced, x), run_latent(latent, x), rtol=1e-7, atol=1e-9)


def test_inputs_that_calibration_lacks_still_count() -> None:
    """A moment of few tokens has no energy in most directions; other text has."""
    latent = sample()
    few = tokens(40, False, length=3, seed=8)
    balanced = balanced_basis(latent, few.T @ few / 3)
    x = tokens(40, False)
    torch.testing.assert_close(run_latent(balanced, x), run_latent(latent, x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("calibrated", [False, True])
def test_planes_of_the_rotary_key_get_unit_size_exactly(calibrated: bool) -> None:
    latent = sample()
    latent = replace(
        latent, k_rope=latent.k_rope * torch.logspace(-2, 3, 4, dtype=torch.float64).repeat(2)[:, None]
    )
    inputs = moment(40)[:40, :40] if calibrated else None
    unit = unit_rotary_key(latent, inputs)
    x = tokens(40, False)
    torch.testing.assert_close(run_latent(unit, x), run_latent(latent, x), rtol=1e-12, atol=1e-12)
    ratio = (latent.k_rope / unit.k_rope).log2()
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-12)
    rows = unit.k_rope
    sizes = ((rows if inputs is None else rows @ inputs) * rows).sum(1).view(2, -1).mean(0).sqrt()
    assert sizes.min() > 0.7 and sizes.max() < 1.42


def test_a_layer_of_zeros_stays() -> None:
    latent = replace(sample(), kv_down=torch.zeros(24, 40, dtype=torch.float64))
    assert balanced_basis(latent) is latent
    silent = replace(latent, k_rope=torch.zeros_like(latent.k_rope))
    assert torch.equal(unit_rotary_key(silent).k_rope, silent.k_rope)


def test_elements_are_equal_and_no_basis_costs_less() -> None:
    latent = sample()
    inputs = moment(40)[:40, :40]
    inputs = inputs + RIDGE * inputs.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    before, after = costs(latent, inputs), costs(balanced_basis(latent, inputs), inputs)
    # The bound over all invertible maps: the square of the sum of roots of the eigenvalues, over the rank.
    content = latent.kv_down @ inputs @ latent.kv_down.T
    roots = torch.linalg.eigvals(content @ rounding_cost(latent, inputs)).real.clamp(min=0).sqrt()
    bound = roots.sum() ** 2 / 24
    assert before.sum() > 1.2 * bound
    assert bound * (1 - 1e-6) <= after.sum() < 1.03 * bound
    assert after.max() < 1.5 * after.mean()


def test_rounding_to_fp8_costs_less() -> None:
    latent = sample()
    latent = replace(latent, v_up=latent.v_up * torch.logspace(0, -3, 24, dtype=torch.float64))
    x = tokens(40, False, length=200)

    def error(layer: LatentWeights) -> float:
        content = x @ layer.kv_down.T
        noise = dequantize_latent(*quantize_latent(content)).double() - content
        return float(torch.einsum("tr,rs,ts->", noise, rounding_cost(layer, x.T @ x / len(x)), noise))

    assert error(balanced_basis(latent, x.T @ x / len(x))) < 0.7 * error(latent)


@pytest.mark.parametrize("order", [1, 2, 3, 128, 144, 208])
def test_the_rotation_is_orthogonal_and_flat(order: int) -> None:
    rotation = flat_rotation(order)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(order, dtype=torch.float64))
    assert rotation.abs().max() <= (2 / order) ** 0.5 * (1 + 1e-9)
