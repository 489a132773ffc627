"""What the layouts count of a cache is what the stock class caches: hybrid models, and merged attention."""

from __future__ import annotations

import pytest
import torch

from headwise.models.architecture import find_architecture
from headwise.models.layout import CacheSize, cached_tokens, caches, state_bytes
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


def test_merged_attention_has_a_cache_of_each_kind_of_token() -> None:
    model, config = tiny_models.build("t5gemma2")
    layouts = find_architecture(config).layouts(config)
    given = tiny_models.inputs_of(model)
    with torch.inference_mode():
        cache = model(**given, use_cache=True).past_key_values
    decoder, encoder = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
    held = sum(tensor.numel() for layer in (*decoder, *encoder) for tensor in (layer.keys, layer.values))
    counted = {"decoder": given["decoder_input_ids"], "cross": given["input_ids"]}
    sizes = [(x, counted[x.part].numel()) for x in caches(layouts)]
    # The stock cache of a window of 5 keeps 4 tokens of each of the two sequences.
    assert held == sum(
        min(2 * 4 if x.sliding_window else tokens, tokens) * x.cache_elements_per_token for x, tokens in sizes
    )
    assert [cached_tokens(x) for x in layouts] == ["token"] * 2 + ["decoder or encoder token"] * 3
    size = CacheSize.of(layouts, torch.float32, 100)
    each = layouts[-1].cache_elements_per_token * torch.float32.itemsize
    assert (size.bytes_per_token, size.at[100]) == (6 * each, (100 + 2 * 5 + 3 * 100) * each)


def test_a_hybrid_without_positions_has_no_rotary_dimensions() -> None:
    for kind, rotary_dim in (("rope", 8), ("nope", 0), (None, 0)):
        config = tiny_models.config_of("granitemoehybrid", position_embedding_type=kind)
        layouts = find_architecture(config).layouts(config)
        assert [layout.rotary_dim for layout in layouts] == [0, rotary_dim, rotary_dim]
