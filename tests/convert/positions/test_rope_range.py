"""How far frequencies hold, for each set of layers."""

from __future__ import annotations

from headwise.convert.positions.rope_range import rope_ranges
from headwise.models.architecture import find_architecture
from tests import tiny_models


def test_each_set_of_layers_has_its_own_range() -> None:
    config = tiny_models.config_of("gemma3_text", head_dim=64)
    found = {r.layer_type: r for r in rope_ranges(config, find_architecture(config), 8192)}
    assert found["sliding_attention"].context == config["sliding_window"]
    assert found["full_attention"].context == 8192
    assert found["full_attention"].to_dict()["holds"] == found["full_attention"].holds
    assert any("static" in line for line in found["full_attention"].lines())
