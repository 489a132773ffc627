"""Merging the heads of a layer: exact where it must be, with the reported error, on one device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headwise import registry
from headwise.convert.gqa.merge import merge_heads
from headwise.models.layout import LayerWeights
from tests.convert.devices import META, difference, moments, needs_gpu, on, sample_layer
from tests.convert.gqa.samples import SHAPES, gauge, inputs_like, moment_of, relative
from tests.reference import attend, frequencies, random_layer

METHODS = registry.method_names("merge")
NORMS = [None, "head", "all"]
# Rounding differs between devices.
SAME = 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_change_of_coordinates_keeps_the_output(shape):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias)
    x, f = inputs_like(layer), frequencies(rotary)
    assert relative(attend(gauge(layer), x, f), attend(layer, x, f)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_number_of_heads_changes_no_bit(shape):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias)
    merged, report = merge_heads(layer, groups)
    assert all(torch.equal(getattr(merged, n), getattr(layer, n)) for n in "qkvo")
    assert report.key_error == report.value_error == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scope", [None, "head", "all"])
def test_more_heads_are_exact(shape, scope):
    heads, groups, d, rotary, hidden, bias = shape
    layer = random_layer(heads, groups, d, hidden, rotary_dim=rotary, bias=bias, norm_scope=scope)
    x, f = inputs_like(layer), frequencies(rotary)
    wide, _ = merge_heads(layer, heads)
    assert wide.layout.num_key_value_heads == heads
    assert relative(attend(wide, x, f), attend(layer, x, f)) < 1e-14


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_that_differ_by_coordinates_merge_exactly(shape, calibrated):
    """Replicas in random coordinates and a random order: grouping finds them, and merging is exact."""
    heads, groups, d, rotary, hidden, bias = shape
    if heads == groups:
        layer = random_layer(heads, 1 if heads % 2 else heads // 2, d, hidden, rotary_dim=rotary, bias=bias)
    else:
        layer = random_layer(heads, groups // 2, d, hidden, rotary_dim=rotary, bias=bias)
    wide, _ = merge_heads(layer, groups)
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(5))
    reads = wide.layout.queries_per_group
    queries = (order[:, None] * reads + torch.arange(reads)).flatten()
    hidden_replicas = gauge(replace(wide, q=wide.q[queries], k=wide.k[order], v=wide.v[order], o=wide.o[queries]))
    x, f = inputs_like(layer), frequencies(rotary)
    moment = moment_of(layer, x) if calibrated else None
    merged, report = merge_heads(hidden_replicas, layer.layout.num_key_value_heads, moment=moment)
    assert relative(attend(merged, x, f), attend(layer, x, f)) < 1e-7
    assert report.key_error < 1e-9 and report.value_error < 1e-9


@pytest.mark.parametrize("scope", ["head", "all"])
def test_normed_heads_that_differ_by_sign_and_scale_merge_exactly(scope):
    layer = random_layer(8, 4, 8, 32, norm_scope=scope)
    g = torch.Generator().manual_seed(0)
    wide, _ = merge_heads(layer, 8)
    sign = torch.randint(2, (8, 4), generator=g).double() * 2 - 1
    sign = torch.cat([sign, sign], 1)[:, :, None]
    scale = torch.rand(8, 1, 1, generator=g).double() + 0.5 if scope == "head" else 1.0
    wide = replace(wide, k=scale * sign * wide.k, q=sign * wide.q)
    x, f = inputs_like(layer), frequencies(8)
    assert relative(attend(wide, x, f), attend(layer, x, f)) < 1e-6
    merged, report = merge_heads(wide, 4, moment=moment_of(layer, x))
    assert relative(attend(merged, x, f), attend(layer, x, f)) < 1e-4  # the norm's eps is not scale-free
    assert report.key_error < 1e-9


def test_the_reported_error_is_the_measured_one():
    """The report's value error, against the outputs themselves under uniform attention weights of one token."""
    layer = random_layer(8, 8, 8, 24)
    x = inputs_like(layer, 600)
    merged, report = merge_heads(layer, 2, moment=moment_of(layer, x))
    reads = merged.layout.queries_per_group
    order = [j for group in report.groups for j in group]
    got = torch.einsum("hvi,ti,hdv->htd", merged.v.repeat_interleave(reads, 0), x, merged.o)
    want = torch.einsum("hvi,ti,hdv->htd", layer.v[order], x, layer.o[order])
    assert float((got - want).square().sum() / want.square().sum()) == pytest.approx(report.value_error, rel=1e-6)


@pytest.mark.parametrize("bad", [0, 3, 5, 16])
def test_a_head_count_that_is_no_divisor_is_refused(bad):
    with pytest.raises(ValueError, match="KV heads"):
        merge_heads(random_layer(8, 8, 8, 24), bad)


@pytest.mark.parametrize("scope", [None, "head", "all"])
def test_a_pooling_reports_its_errors_where_they_are_measured(scope: str | None) -> None:
    layer = random_layer(4, 4, 8, 24, norm_scope=scope)
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pooled, report = merge_heads(layer, 2, method="mean", grouping="contiguous", moment=x.mT @ x / len(x))
    spread = layer.v.unflatten(0, (2, 2)) - pooled.v[:, None]
    got, all_of_it = (torch.einsum("hvi,ti,hdv->htd", v, x, layer.o) for v in (spread.flatten(0, 1), layer.v))
    assert report.value_error == pytest.approx(float(got.square().sum() / all_of_it.square().sum()), rel=1e-9)
    assert report.key_error is not None and report.key_error > 0
    best = merge_heads(layer, 2, method="optimal", grouping="contiguous", moment=x.mT @ x / len(x))[1]
    assert best.value_error is not None and best.value_error < report.value_error
    twins, _ = merge_heads(merge_heads(layer, 2, method="first", grouping="contiguous")[0], 4)
    nothing = merge_heads(twins, 2, method="mean", grouping="contiguous", moment=x.mT @ x / len(x))[1]
    assert nothing.key_error == pytest.approx(0, abs=1e-12) == nothing.value_error


def merge_arguments(weights: LayerWeights, measured: bool) -> dict[str, Tensor]:
    inputs = weights.q.shape[2]
    names = ("moment", "value_moment") if measured else ()
    return {n: moments(weights)[n][:inputs, :inputs] for n in names}


@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_merging_creates_no_tensor_on_another_device(method: str, norm: str | None, measured: bool) -> None:
    weights = sample_layer((8, 8, 8, 4, 36, norm is None), norm_scope=norm)
    given = merge_arguments(weights, measured)
    wanted, _ = merge_heads(weights, 2, method=method, **given)
    with META:
        got, _ = merge_heads(weights, 2, method=method, **given)
    assert difference(got, wanted, weights) < 1e-9


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_merging_is_the_same_on_a_gpu(method: str, norm: str | None, measured: bool) -> None:
    weights = sample_layer((8, 8, 8, 4, 36, norm is None), norm_scope=norm)
    given = merge_arguments(weights, measured)
    wanted, _ = merge_heads(weights, 2, method=method, **given)
    got, _ = merge_heads(weights.to_device("cuda"), 2, method=method, **on("cuda", given))
    assert got.k.device.type == "cuda"
    assert difference(got.to_device("cpu"), wanted, weights) < SAME
