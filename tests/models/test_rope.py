"""The RoPE rules against independent computations."""

from __future__ import annotations

import pytest
import torch

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
