"""Windows set in memory, against stock classes that have them."""

from __future__ import annotations

import pytest
import torch

from headwise.measure.loss import token_nats
from headwise.measure.window_loss import limited_attention, loss_beyond, window_mask
from headwise.models.architecture import find_architecture
from tests import tiny_models
from tests.convert.positions.test_windows import WINDOW, windowed


@pytest.mark.parametrize("first", [0, 2])
def test_a_mask_shows_the_latest_and_the_first_tokens(first: int) -> None:
    mask = window_mask(7, 3, first, torch.float32, "cpu")[0, 0]
    for query in range(7):
        for key in range(7):
            assert (mask[query, key] == 0) == (key <= query and (key > query - 3 or key < first))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_oss", "mistral"])
def test_windows_in_memory_are_those_of_the_stock_class(model_type: str) -> None:
    model, other, new = windowed(model_type, WINDOW, "1")
    arch = find_architecture(new)
    blocks = tiny_models.tokens(13)
    layouts = arch.layouts(new)
    without = [i for i in range(len(layouts)) if i != 1]
    model = other if model_type == "gpt_oss" else model  # its own layers have windows
    with torch.no_grad(), limited_attention(model, [arch.attention_path(i) for i in without], 99):
        with limited_attention(model, [arch.attention_path(1)], WINDOW):
            limited = model(blocks).logits
        torch.testing.assert_close(limited, other(blocks).logits, rtol=0, atol=1e-5)
        assert model_type == "gpt_oss" or (model(blocks).logits - limited).abs().max() > 1e-4


def test_tokens_behind_the_window_count() -> None:
    model, config = tiny_models.build("llama", attention_bias=False)
    paths = [find_architecture(config).attention_path(0)]
    blocks = tiny_models.tokens(12)
    plain = loss_beyond(model, blocks, WINDOW)
    nats = token_nats(model, blocks)
    assert plain.tokens == len(blocks) * (11 - WINDOW)
    assert plain.nats == pytest.approx(float(nats[:, WINDOW:].double().mean()), rel=1e-6)
    limited = loss_beyond(model, blocks, WINDOW, paths)
    assert limited.nats != pytest.approx(plain.nats, abs=1e-5)
    assert loss_beyond(model, blocks, WINDOW, paths, first=12).nats == pytest.approx(plain.nats, rel=1e-6)
    assert loss_beyond(model, blocks, WINDOW).nats == plain.nats
