"""The RoPE bound against its definition, the search for bases, and the choice of a rule."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.convert.positions import rope_bound
from headwise.models import rope

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = {"rotary_dim": 64, "trained": 1024, "context": 4096}


def test_the_bound_equals_its_definition() -> None:
    frequencies = rope.base_frequencies(10000, 64)
    expected = torch.tensor(
        [sum(math.cos(m * w) for w in frequencies.tolist()) for m in range(300, 701)], dtype=torch.float64
    )
    torch.testing.assert_close(rope_bound.similarity(frequencies, 700, 300), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("base", "dim", "length", "holds"),
    [
        (10_000, 128, 8192, False),
        (500_000, 128, 16384, True),
        # Not monotone: with heads of 64, a million holds for less than half a million.
        (500_000, 64, 8192, True),
        (1_000_000, 64, 8192, False),
    ],
)
def test_which_bases_hold(base: float, dim: int, length: int, holds: bool) -> None:
    frequencies = rope.base_frequencies(base, dim)
    failure = rope_bound.first_failure(frequencies, length)
    assert (failure is None) == holds
    brute = torch.outer(torch.arange(length + 1, dtype=torch.float64), frequencies).cos().sum(1)
    assert bool((brute >= 0).all()) == holds
    if failure is not None:
        assert failure == int((brute < 0).nonzero()[0])


def test_the_first_failure_is_found_beyond_the_first_block() -> None:
    frequencies = rope.base_frequencies(500_000, 128)
    failure = rope_bound.first_failure(frequencies, 1_000_000)
    curve = rope_bound.similarity(frequencies, 20_000)
    assert failure == int((curve < 0).nonzero()[0]) > 4096


@pytest.mark.parametrize("dim", [64, 128])
def test_the_smallest_base_holds_and_the_grid_below_it_does_not(dim: int) -> None:
    found = rope_bound.smallest_base(dim, 4096)
    step = 1 + found.resolution
    assert rope_bound.first_failure(rope.base_frequencies(found.smallest, dim), 4096) is None
    assert rope_bound.first_failure(rope.base_frequencies(found.smallest / step, dim), 4096) is not None
    assert rope_bound.first_failure(rope.base_frequencies(found.always_from / step, dim), 4096) is not None
    for i in range(0, int(math.log(10) / math.log(step)), 7):
        assert rope_bound.first_failure(rope.base_frequencies(found.always_from * step**i, dim), 4096) is None
    assert found.smallest <= found.always_from


def test_no_base_holds_for_a_single_plane() -> None:
    assert rope_bound.smallest_base(2, 100).smallest == math.inf


def test_planes_that_never_turned() -> None:
    slow = torch.tensor([1.0, 2 * math.pi / 1000, 2 * math.pi / 1001, 1e-5])
    assert rope_bound.never_turned(slow, 1000) == 0.5


def test_auto_follows_the_source() -> None:
    def chosen(parameters: rope.Parameters) -> str:
        return rope_bound.recommend_rule(parameters, rotary_dim=SIZES["rotary_dim"], trained=SIZES["trained"]).rule

    assert chosen(PLAIN) == "yarn"
    assert chosen(rope.rescale(PLAIN, "llama3", **SIZES)) == "llama3"
    assert chosen(rope.rescale(PLAIN, "linear", **SIZES)) == "ntk"
