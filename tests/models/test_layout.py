"""Layouts of hybrid models: the states of their linear layers are those of the stock cache."""

from __future__ import annotations

import pytest
import torch

from headwise.models.architecture import find_architecture
from headwise.models.layout import CacheSize, state_bytes
from tests import tiny_models

HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "granitemoehybrid")


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_the_states_of_linear_layers_are_counted(model_type: str) -> None:
    model, config = tiny_models.build(model_type)
    layouts = find_architecture(config).layouts(config)
    assert [layout.kind for layout in layouts] == ["linear", "gqa", "gqa"]
    with torch.inference_mode():
        cache = model(input_ids=tiny_models.tokens()[:1], use_cache=True).past_key_values
    held = [
        tensor.nbytes
        for layer in cache.layers
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
        for tensor in states.values()
        if tensor is not None
    ]
    assert sum(held) == state_bytes(layouts, torch.float32) > 0
    size = CacheSize.of(layouts, torch.bfloat16)
    assert list(CacheSize.of(layouts, torch.bfloat16, 40_960).at) == [8_192, 32_768, 40_960]
    assert list(CacheSize.of(layouts, torch.bfloat16, 8_192).at) == [8_192]
    assert size.at[8192] - state_bytes(layouts, torch.bfloat16) == 8192 * size.bytes_per_token
    assert size.bytes_per_token == 2 * sum(layout.cache_elements_per_token for layout in layouts[1:])


def test_a_hybrid_without_positions_has_no_rotary_dimensions() -> None:
    for kind, rotary_dim in (("rope", 8), ("nope", 0), (None, 0)):
        config = tiny_models.config_of("granitemoehybrid", position_embedding_type=kind)
        layouts = find_architecture(config).layouts(config)
        assert [layout.rotary_dim for layout in layouts] == [0, rotary_dim, rotary_dim]
