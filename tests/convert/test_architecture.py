"""Every row of architectures.yaml against the stock class: round trip, gauge law, exact lifts, configs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert import architecture
from headwise.convert.layout import LayerWeights, planes, rows
from tests import tiny_models

ROWS = sorted(tiny_models.CONFIGS)


def random_gauge(weights: LayerWeights, seed: int) -> LayerWeights:
    """The layer in other coordinates that compute the same (mathematics, section 1).

    Values get any invertible matrix per key-value head, position-free keys too; each plane of rotary keys gets
    a complex scalar. Under norms on queries and keys only the signs of planes are free in general.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layout = weights.layout
    heads, groups, turning = layout.num_attention_heads, layout.num_key_value_heads, layout.rotary_dim
    group = torch.arange(heads) // layout.queries_per_group
    still = layout.head_dim - turning

    mix = noise(groups, layout.v_head_dim, layout.v_head_dim) + 2 * torch.eye(layout.v_head_dim)
    v = mix @ weights.v
    o = weights.o @ torch.linalg.inv(mix)[group]
    if weights.q_norm is not None:
        half = torch.randint(0, 2, (groups, turning // 2), generator=generator).double() * 2 - 1
        rest = torch.randint(0, 2, (groups, still), generator=generator).double() * 2 - 1
        signs = torch.cat([half, half, rest], dim=1)[..., None]
        return replace(weights, q=weights.q * signs[group], k=weights.k * signs, v=v, o=o)
    scalar = torch.polar(0.5 + noise(groups, turning // 2).abs(), noise(groups, turning // 2))[..., None]
    free = noise(groups, still, still) + 2 * torch.eye(still)
    k = torch.cat([rows(scalar * planes(weights.k, turning)), free @ weights.k[:, turning:]], dim=1)
    q_turning = rows(planes(weights.q, turning) / scalar.conj()[group])
    q_still = torch.linalg.inv(free).mT[group] @ weights.q[:, turning:]
    return replace(weights, q=torch.cat([q_turning, q_still], dim=1), k=k, v=v, o=o)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), tiny_models.float64_throughout():
        return model(input_ids=tiny_models.tokens()).logits


def load_layers(model: torch.nn.Module, arch, tensors: dict[str, torch.Tensor]) -> None:
    """Put checkpoint tensors into the stock modules they belong to."""
    state = model.state_dict()
    named = {
        name.replace(arch.layers[0].split("{")[0], arch.module.split("{")[0]): t for name, t in tensors.items()
    }
    assert set(named) <= set(state)
    model.load_state_dict(named, strict=False)


@pytest.mark.parametrize("model_type", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reading_and_writing_a_layer_changes_no_bit(model_type, dtype, tmp_path):
    tiny_models.save(model_type, tmp_path, dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    config = tiny_models.read_config(tmp_path)
    arch = architecture.find(config, tensors)
    for layer in range(len(arch.layouts(config))):
        back = arch.write_layer(config, layer, arch.read_layer(config, layer, tensors), dtype)
        assert set(back) == set(arch.tensor_names(config, layer))
        for name, tensor in back.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("model_type", ROWS)
def test_a_random_gauge_moves_no_logit(model_type):
    model, config = tiny_models.build(model_type)
    model.double()
    before = logits(model)
    arch = architecture.find(config)
    tensors = tiny_models.checkpoint(model)
    for layer in range(len(arch.layouts(config))):
        weights = arch.read_layer(config, layer, tensors)
        turned = random_gauge(weights, seed=layer)
        assert not torch.allclose(turned.k, weights.k)
        load_layers(model, arch, arch.write_layer(config, layer, turned, torch.float64))
    after = logits(model)
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
