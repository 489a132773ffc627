"""The pure rules and the bound, against independent computations."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.convert.positions import rope_bound as bound
from headwise.models import rope

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = {"rotary_dim": 64, "trained": 1024, "context": 4096}


def turn(parameters: dict, length: int | None = None, trained: int = 1024) -> torch.Tensor:
    return rope.frequencies(parameters, 64, trained, length)[0]


def test_ntk_keeps_the_fastest_plane_and_slows_the_slowest_by_the_factor() -> None:
    scaled = turn(rope.rescale(PLAIN, "ntk", **SIZES))
    assert scaled[0] == 1.0
    assert turn(PLAIN)[-1] / scaled[-1] == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("rule", rope.EXACT_WHEN_SHORT)
def test_rules_that_promise_it_leave_short_inputs_alone(rule: str) -> None:
    scaled = rope.rescale(PLAIN, rule, **SIZES)
    short, scale = rope.frequencies(scaled, 64, 1024, 1024)
    assert torch.equal(short, turn(PLAIN))
    assert scale == 1.0
    assert not torch.equal(turn(scaled, 4096), turn(PLAIN))


def test_every_rule_slows_and_none_turns_faster() -> None:
    for rule in rope.RULES:
        scaled = rope.rescale(PLAIN, rule, **SIZES, rope_theta=1e6 if rule == "base" else None)
        ratio = turn(PLAIN) / turn(scaled, 4096)
        assert (ratio >= 1 - 1e-12).all(), rule
        assert ratio[-1] > 3.9, rule


def test_linear_composes_with_linear_and_with_ntk() -> None:
    once = rope.rescale(PLAIN, "linear", rotary_dim=64, trained=1024, context=2048)
    twice = rope.rescale(once, "linear", rotary_dim=64, trained=2048, context=4096)
    torch.testing.assert_close(turn(twice), turn(PLAIN) / 4)
    mixed = rope.rescale(once, "ntk", rotary_dim=64, trained=2048, context=4096)
    torch.testing.assert_close(turn(mixed), turn(rope.rescale(PLAIN, "ntk", **(SIZES | {"trained": 2048}))) / 2)


@pytest.mark.parametrize("rule", ["yarn", "llama3"])
def test_a_scaled_source_carries_on_from_its_original_length(rule: str) -> None:
    once = rope.rescale(PLAIN, rule, rotary_dim=64, trained=1024, context=2048)
    twice = rope.rescale(once, rule, rotary_dim=64, trained=2048, context=4096)
    assert twice == rope.rescale(PLAIN, rule, **SIZES)


def test_longrope_composes_by_multiplying_its_long_factors() -> None:
    once = rope.rescale(PLAIN, "longrope", rotary_dim=64, trained=1024, context=2048)
    twice = rope.rescale(once, "longrope", rotary_dim=64, trained=2048, context=4096)
    assert twice["original_max_position_embeddings"] == 1024
    assert twice["factor"] == 4
    assert twice["long_factor"][-1] == pytest.approx(4.0)
    assert twice["short_factor"] == once["short_factor"]


def test_a_dynamic_source_is_replaced() -> None:
    dynamic = rope.rescale(PLAIN, "dynamic", rotary_dim=64, trained=1024, context=2048)
    assert rope.rescale(dynamic, "ntk", **SIZES) == rope.rescale(PLAIN, "ntk", **SIZES)
    assert rope.rescale(dynamic, "yarn", **SIZES) == rope.rescale(PLAIN, "yarn", **SIZES)


def test_what_does_not_compose_is_refused_with_the_reason() -> None:
    yarn = rope.rescale(PLAIN, "yarn", **SIZES)
    with pytest.raises(ValueError, match="already scales by yarn"):
        rope.rescale(yarn, "ntk", rotary_dim=64, trained=4096, context=8192)
    with pytest.raises(ValueError, match=r"attention_factor 1\.3 by hand"):
        rope.rescale(yarn | {"attention_factor": 1.3}, "yarn", rotary_dim=64, trained=4096, context=8192)
    with pytest.raises(ValueError, match="below 1"):
        rope.rescale(PLAIN, "ntk", rotary_dim=64, trained=4096, context=1024)
    with pytest.raises(ValueError, match=r"own factor 0\.5 is below 1"):
        rope.rescale(PLAIN | {"rope_type": "linear", "factor": 0.5}, "linear", **SIZES)
    with pytest.raises(ValueError, match="above the present 10000"):
        rope.rescale(PLAIN, "base", **SIZES, rope_theta=5000)


def test_the_bound_equals_its_definition() -> None:
    frequencies = rope.base_frequencies(10000, 64)
    expected = torch.tensor(
        [sum(math.cos(m * w) for w in frequencies.tolist()) for m in range(300, 701)], dtype=torch.float64
    )
    torch.testing.assert_close(bound.similarity(frequencies, 700, 300), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("base", "dim", "length", "holds"),
    [
        (10_000, 128, 8192, False),
        (500_000, 128, 16384, True),
        # Not monotone: with heads of 64, a million reaches less far than half a million.
        (500_000, 64, 8192, True),
        (1_000_000, 64, 8192, False),
    ],
)
def test_which_bases_hold(base: float, dim: int, length: int, holds: bool) -> None:
    frequencies = rope.base_frequencies(base, dim)
    failure = bound.first_failure(frequencies, length)
    assert (failure is None) == holds
    brute = torch.outer(torch.arange(length + 1, dtype=torch.float64), frequencies).cos().sum(1)
    assert bool((brute >= 0).all()) == holds
    if failure is not None:
        assert failure == int((brute < 0).nonzero()[0])


def test_the_first_failure_is_found_beyond_the_first_block() -> None:
    frequencies = rope.base_frequencies(500_000, 128)
    failure = bound.first_failure(frequencies, 1_000_000)
    curve = bound.similarity(frequencies, 20_000)
    assert failure == int((curve < 0).nonzero()[0]) > 4096


@pytest.mark.parametrize("dim", [64, 128])
def test_the_smallest_base_holds_and_the_grid_below_it_does_not(dim: int) -> None:
    found = bound.smallest_base(dim, 4096)
    step = 1 + found.resolution
    assert bound.first_failure(rope.base_frequencies(found.smallest, dim), 4096) is None
    assert bound.first_failure(rope.base_frequencies(found.smallest / step, dim), 4096) is not None
    assert bound.first_failure(rope.base_frequencies(found.always / step, dim), 4096) is not None
    for i in range(0, int(math.log(10) / math.log(step)), 7):
        assert bound.first_failure(rope.base_frequencies(found.always * step**i, dim), 4096) is None
    assert found.smallest <= found.always


def test_no_base_holds_for_a_single_plane() -> None:
    assert bound.smallest_base(2, 100).smallest == math.inf


def test_planes_that_never_turned() -> None:
    slow = torch.tensor([1.0, 2 * math.pi / 1000, 2 * math.pi / 1001, 1e-5])
    assert bound.never_turned(slow, 1000) == 0.5


def test_auto_follows_the_source() -> None:
    def chosen(parameters: rope.Parameters) -> str:
        return bound.recommend(parameters, rotary_dim=SIZES["rotary_dim"], trained=SIZES["trained"]).rule

    assert chosen(PLAIN) == "yarn"
    assert chosen(rope.rescale(PLAIN, "llama3", **SIZES)) == "llama3"
    assert chosen(rope.rescale(PLAIN, "linear", **SIZES)) == "ntk"
