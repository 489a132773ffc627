"""Moments of normed queries and keys, against the norms of the stock model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert.calibration.norm_stats import NormedProjections
from headwise.models.architecture import find_architecture
from headwise.models.fusion import half_split_order, reorder
from tests import tiny_models
from tests.convert.calibration.samples import hook_whole_model, stream
from tests.convert.rows import load


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "apertus"])
def test_normed_rows_are_those_of_the_stock_norms(model_type, tmp_path):
    source = tiny_models.save(model_type, tmp_path / "model")
    tensors, config = load_file(source / "model.safetensors"), tiny_models.read_config(source)
    arch, tokens = find_architecture(config, tensors), tiny_models.tokens(15)
    norms = arch.qk_norm(config)
    assert norms is not None
    model, normed = load(source, arch), {}
    for layer in range(len(arch.layouts(config))):
        attention = model.get_submodule(arch.attention_path(layer))
        for part, name in (("q", norms.q), ("k", norms.k)):
            attention.get_submodule(name).register_forward_hook(
                lambda module, given, output, key=(layer, part): normed.update({key: output})
            )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    whole = hook_whole_model(source, arch, tokens, attn_implementation="eager")

    def projections(layer):
        return NormedProjections(arch.read_layer(config, layer, tensors), model.config.rms_norm_eps)

    for record, here in zip(stream(source, tokens, normed=projections), whole, strict=True):
        weights = arch.read_layer(config, record.index, tensors)
        order = half_split_order(weights.layout, arch.rotary_layout)
        x = torch.cat([here["x"], torch.ones(2, 15, 1)], -1).double()
        # Position 0 counts neither as a query nor as a key.
        received = {"q": torch.ones(2, 15).double(), "k": here["p"][:, :, 1:].sum((1, 2)).double()}
        for weight in received.values():
            weight[:, 0] = 0
            weight /= weight.sum()
        for part, cross, scales in (
            ("q", record.query_cross, record.query_scales),
            ("k", record.key_cross, record.key_scales),
        ):
            heads = len(getattr(weights, part))
            output = normed[record.index, part]
            if output.dim() == 4 and output.shape[1] == heads:  # (batch, heads, tokens, head_dim)
                output = output.transpose(1, 2)
            rows = output.reshape(2, 15, heads, -1).double()
            expected = torch.einsum("bt,bthd,bti->hdi", received[part], rows, x)
            torch.testing.assert_close(cross, reorder(expected, order), rtol=1e-4, atol=1e-6)
            energy = torch.einsum("bt,bthd->h", received[part], rows.square())
            torch.testing.assert_close(scales[2], energy, rtol=1e-4, atol=1e-6)


def test_a_layer_without_norms_has_no_normed_rows(tmp_path):
    source = tiny_models.save("llama", tmp_path / "model")
    tensors, config = load_file(source / "model.safetensors"), tiny_models.read_config(source)
    weights = find_architecture(config, tensors).read_layer(config, 0, tensors)
    with pytest.raises(ValueError, match="no norms"):
        NormedProjections(weights, 1e-6).keys(torch.ones(2, 37, dtype=torch.float64))
