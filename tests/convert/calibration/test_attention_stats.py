"""Moments under attention, against the attention weights of the stock model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert.calibration import attention_stats
from headwise.convert.calibration.attention_stats import NUM_ATTENTION_QUERIES, sum_by_distance
from headwise.models.architecture import find_architecture
from headwise.models.layout import LayerWeights
from tests import tiny_models
from tests.convert.calibration.samples import hook_whole_model, stream


def test_the_spread_of_attended_inputs_is_positive(tmp_path):
    """Also if only some queries are measured: the closed form of MLA diverges otherwise."""
    source = tiny_models.save("llama", tmp_path / "model")
    for record in stream(source, tiny_models.tokens(4 * NUM_ATTENTION_QUERIES)):
        assert record.key_moment is not None and record.value_moment is not None
        spread = torch.linalg.eigvalsh(record.key_moment - record.value_moment)
        assert spread[0] > -1e-5 * spread[-1]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "smollm3"])
def test_attention_statistics_are_those_of_the_weights(model_type, tmp_path):
    """Distances and the moment of keys from the weights; that of values from the input of the output matrix.

    Position 0 counts neither as a query nor as a key. With one KV head, every head's values are `V y` with y the
    averaged input, so the moment of what the output matrix reads must be `V value_moment V^T`.
    """
    source = tiny_models.save(model_type, tmp_path / "model", num_key_value_heads=1)
    tensors, config = load_file(source / "model.safetensors"), tiny_models.read_config(source)
    arch = find_architecture(config, tensors)
    tokens = tiny_models.tokens(15)
    whole = hook_whole_model(source, arch, tokens, attn_implementation="eager")
    for record, here in zip(stream(source, tokens), whole, strict=True):
        weights: LayerWeights = arch.read_layer(config, record.index, tensors)
        assert record.value_moment is not None and record.distances is not None
        x = torch.cat([here["x"], torch.ones(2, 15, 1)], -1).double()
        p = here["p"].double()
        sink = p[:, :, 1:, :1].clone()
        p[..., 0] = 0
        attended = torch.einsum("bhqn,bni,bnj->ij", p[:, :, 1:], x, x) / p[:, :, 1:].sum()
        torch.testing.assert_close(record.key_moment, attended, rtol=1e-4, atol=1e-6)
        v = weights.v[0]
        first = x[:, 0, : v.shape[1]] @ v.T.double()
        values = here["z"].double().unflatten(-1, (-1, v.shape[0]))[:, 1:]
        values = values - sink.transpose(1, 2) * first[:, None, None]
        moment = record.value_moment[: v.shape[1], : v.shape[1]]
        expected = torch.einsum("bqhi,bqhj->ij", values, values / p[:, :, 1:].sum(-1).transpose(1, 2)[..., None])
        torch.testing.assert_close(v @ moment @ v.T, expected / p[:, :, 1:].sum(), rtol=1e-4, atol=1e-6)
        share = torch.stack([p.sum(0).diagonal(-d, 1, 2).sum(-1) for d in range(15)], -1)
        torch.testing.assert_close(record.distances, share / share.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)
        window = weights.layout.sliding_window
        if window:
            assert float(record.distances[:, window:].abs().max()) == 0.0


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 21])
def test_sums_by_distance(length: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all heads in one operation, of some, and of one at a time."""
    monkeypatch.setattr(attention_stats, "ELEMENTS_AT_ONCE", at_once)
    weights = torch.rand(3, length, length, generator=torch.Generator().manual_seed(0))
    expected = [
        [
            sum(float(head[i, j]) for i in range(length) for j in range(length) if abs(i - j) == distance)
            for distance in range(length)
        ]
        for head in weights
    ]
    sums = sum_by_distance(weights)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64))
