"""Stock models without weights take no memory for parameters, and their buffers have values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.models.stock import empty_model
from tests import tiny_models

CAUSAL = "AutoModelForCausalLM"


def test_experts_larger_than_any_address_space_take_no_memory() -> None:
    sizes = {"hidden_size": 1 << 16, "moe_intermediate_size": 1 << 21, "n_routed_experts": 256}
    model = empty_model(tiny_models.config_of("deepseek_v3", **sizes), CAUSAL)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert max(parameter.nbytes for parameter in model.parameters()) == 1 << 48


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next"])
def test_buffers_are_those_of_a_model_with_weights(model_type: str) -> None:
    model, config = tiny_models.build(model_type)
    buffers = dict(empty_model(config, CAUSAL).named_buffers())
    expected = dict(model.named_buffers())
    assert buffers.keys() == expected.keys() and any("inv_freq" in name for name in buffers)
    for name in [name for name in buffers if "inv_freq" in name]:
        assert torch.equal(buffers[name], expected[name]), name


def test_a_buffer_that_a_file_fills_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Scaled(LlamaMLP):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("scale", torch.empty(3))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", Scaled)
    model = empty_model(tiny_models.config_of("llama"), CAUSAL)
    assert model.get_buffer("model.layers.0.mlp.scale").device.type == "cpu"


def test_sizes_that_no_tensor_has_are_refused() -> None:
    config = tiny_models.config_of("deepseek_v3", moe_intermediate_size=1 << 60)
    with pytest.raises(HeadwiseError, match=r"no stock deepseek_v3 model can be made.*overflowed"):
        empty_model(config, CAUSAL)
