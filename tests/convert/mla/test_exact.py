"""The exact MLA form: the function and the cache size of the source."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.convert.mla.exact import exact_mla
from tests.convert.devices import META, difference, sample_layer
from tests.convert.devices import SHAPES as DEVICE_SHAPES
from tests.convert.mla.samples import random_source, run_latent, run_source, tokens
from tests.reference import frequencies as plane_frequencies

SHAPES = [
    (4, 4, 8, None),
    (9, 3, 8, None),
    (14, 2, 4, None),
    (28, 4, 4, None),
    (6, 1, 8, None),
    (4, 2, 8, 4),
    (4, 2, 8, 0),
]


@pytest.mark.parametrize(("heads", "groups", "head_dim", "rotary"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_exact_form_keeps_output_and_cache_size(heads, groups, head_dim, rotary, bias):
    weights, frequencies = random_source(heads, groups, head_dim, 24, rotary=rotary, bias=bias)
    x, scale = tokens(24, bias), 0.4
    exact = exact_mla(weights, frequencies, scale=scale)
    torch.testing.assert_close(
        run_latent(exact, x), run_source(weights, frequencies, x, scale), rtol=1e-11, atol=1e-12
    )
    assert exact.layout.cache_elements_per_token == weights.layout.cache_elements_per_token


def test_a_larger_shape_is_exact_and_a_smaller_one_refused():
    weights, frequencies = random_source(4, 2, 8, 24, rotary=0)
    x = tokens(24, False)
    exact = exact_mla(weights, frequencies, scale=0.4, rank=40, rope_dim=16)
    torch.testing.assert_close(run_latent(exact, x), run_source(weights, frequencies, x, 0.4))
    with pytest.raises(ValueError, match="needs a shape of 32"):
        exact_mla(weights, frequencies, scale=0.4, rank=31)


@pytest.mark.parametrize("shape", DEVICE_SHAPES, ids=str)
def test_the_exact_form_creates_no_tensor_on_another_device(shape: Any) -> None:
    weights = sample_layer(shape)
    own = plane_frequencies(weights.layout.rotary_dim)
    with META:
        exact = exact_mla(weights, own, scale=0.3)
    assert difference(exact, exact_mla(weights, own, scale=0.3), weights) == 0
