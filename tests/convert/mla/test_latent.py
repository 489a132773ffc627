"""The approximation of random layers by MLA, in float64: exact at full rank, monotone, coordinate-free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.convert.mla.exact import exact_mla_shape
from headwise.convert.mla.frequencies import partial_frequencies
from headwise.convert.mla.latent import approximate_mla
from headwise.models import deepseek
from headwise.models.layout import LayerWeights, from_planes, to_planes
from tests.convert.devices import META, SHAPES, difference, moments, needs_gpu, on, sample_layer
from tests.convert.mla.samples import THETA, approximate, random_source, run_latent, run_source, tokens
from tests.reference import frequencies as plane_frequencies

CASES = [
    *((shape, method) for shape in SHAPES for method in ("optimal", "transmla", "partial-rope")),
    ((9, 3, 8, 0, 40, False), "optimal"),
]
# Rounding differs between devices, and alternating least squares amplifies it.
SAME = 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups", "rotary"), [(4, 4, 8), (6, 2, 8), (4, 2, 4), (4, 2, 0)])
def test_with_every_frequency_and_full_rank_nothing_is_lost(heads, groups, rotary, bias):
    weights, frequencies = random_source(heads, groups, 8, 40, rotary=rotary, bias=bias)
    rank, rope = exact_mla_shape(weights.layout)
    every = frequencies.repeat_interleave(groups) if rope else deepseek.default_grid(THETA, 8)
    got, report = approximate(weights, frequencies, rank, every, foldings=(1,), num_iterations=20)
    x = tokens(40, bias)
    wanted = run_source(weights, frequencies, x, got.scale)
    assert report.key_error + report.value_error < 1e-9
    # The ridge of the normal equations costs so much; `exact_mla` is exact.
    torch.testing.assert_close(run_latent(got, x), wanted, rtol=1e-3, atol=1e-4)


def test_other_coordinates_of_the_source_change_nothing():
    """Section 1: M on values, a complex scalar per plane and head on keys, with the inverses on the other side."""
    weights, frequencies = random_source(6, 2, 8, 24)
    generator = torch.Generator().manual_seed(5)
    m = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64) + 3 * torch.eye(8, dtype=torch.float64)
    c = torch.randn(2, 4, 1, 2, generator=generator, dtype=torch.float64)
    c = torch.view_as_complex(c) + 1
    of = torch.arange(6) // 3
    turned = replace(
        weights,
        k=from_planes(c * to_planes(weights.k, 8)),
        q=from_planes(to_planes(weights.q, 8) / c.conj()[of]),
        v=m @ weights.v,
        o=weights.o @ torch.linalg.inv(m)[of],
    )
    x = tokens(24, False)
    torch.testing.assert_close(run_source(turned, frequencies, x, 0.4), run_source(weights, frequencies, x, 0.4))
    plain, report = approximate(weights, frequencies, 16, 8, num_iterations=2)
    other, turned_report = approximate(turned, frequencies, 16, 8, num_iterations=2)
    torch.testing.assert_close(run_latent(other, x), run_latent(plain, x), rtol=1e-5, atol=1e-6)
    assert turned_report.errors == pytest.approx(report.errors, rel=1e-6)


def test_every_alternation_lowers_the_expected_error_and_so_does_every_rank():
    weights, frequencies = random_source(8, 4, 8, 32)
    ends = []
    for rank in (4, 12, 24, 32):
        _, report = approximate(weights, frequencies, rank, 8, num_iterations=4)
        assert all(
            later <= sooner * (1 + 1e-9) for sooner, later in zip(report.errors, report.errors[1:], strict=False)
        )
        assert report.errors[-1] < report.errors[0]
        ends.append(report.errors[-1])
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize(("rank", "head_dim"), [(192, 64), (448, 128)])
def test_ranks_that_are_no_powers_of_two(rank, head_dim):
    weights, frequencies = random_source(4, 4, head_dim, 4 * head_dim)
    got, report = approximate(weights, frequencies, rank, 32, num_iterations=0, foldings=(2,))
    assert got.kv_down.shape == (rank, 4 * head_dim)
    assert 0 <= report.value_error < 1 and 0 < report.key_error < 1


def test_optimal_expects_less_damage_than_the_baselines():
    weights, frequencies = random_source(8, 4, 8, 32)
    _, best = approximate(weights, frequencies, 24, 8)
    _, transmla = approximate(weights, frequencies, 24, 8, method="transmla")
    norms = torch.ones(4)
    kept = partial_frequencies(frequencies, 4, 8, "high", norms)
    _, partial = approximate(weights, frequencies, 24, kept, method="partial-rope")
    ours = best.key_error + best.value_error
    assert ours < 0.8 * (transmla.key_error + transmla.value_error)
    assert ours < 0.8 * (partial.key_error + partial.value_error)


@pytest.mark.parametrize("method", ["transmla", "partial-rope"])
def test_baselines_that_drop_nothing_are_exact(method):
    """One KV head, all its frequencies, full rank: both published methods are then mere changes of basis."""
    weights, frequencies = random_source(3, 1, 8, 24)
    got, report = approximate(weights, frequencies, 8, frequencies, method=method, foldings=(1,))
    x = tokens(24, False)
    torch.testing.assert_close(run_latent(got, x), run_source(weights, frequencies, x, got.scale))
    assert report.key_error + report.value_error < 1e-12


def arguments(weights: LayerWeights, method: str, measured: bool) -> dict[str, Any]:
    """The arguments of `approximate_mla` besides a layer."""
    layout, own = weights.layout, plane_frequencies(weights.layout.rotary_dim)
    grid = own[:1].repeat(layout.num_key_value_heads) if method == "partial-rope" else plane_frequencies(8)
    known = moments(weights) if measured else {}
    return {"frequencies": own, "rope_frequencies": grid, "rank": 12, "scale": 0.3, "method": method, **known}


@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize(("shape", "method"), CASES, ids=str)
def test_mla_creates_no_tensor_on_another_device(shape: Any, method: str, measured: bool) -> None:
    weights = sample_layer(shape)
    given = arguments(weights, method, measured)
    wanted, expected = approximate_mla(weights, **given)
    with META:
        got, report = approximate_mla(weights, **given)
    assert difference(got, wanted, weights) < 1e-9
    assert report.key_error == pytest.approx(expected.key_error)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize(("shape", "method"), CASES, ids=str)
def test_mla_is_the_same_on_a_gpu(shape: Any, method: str, measured: bool) -> None:
    weights = sample_layer(shape)
    given = arguments(weights, method, measured)
    wanted, expected = approximate_mla(weights, **given)
    got, report = approximate_mla(weights.to_device("cuda"), **on("cuda", given))
    assert {t.device.type for t in vars(got).values() if isinstance(t, Tensor)} == {"cuda"}
    assert difference(got.to_device("cpu"), wanted, weights) < SAME
    assert (report.key_error, report.value_error) == pytest.approx((expected.key_error, expected.value_error))
