"""Nats per token, against cross-entropy by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.loss import nats_per_token, pair_nats, token_nats
from headwise.text.blocks import blocks_from
from headwise.text.pairs import Pairs, pad
from tests import tiny_models


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


def blocks(rows: int = 7) -> torch.Tensor:
    return torch.randint(0, 50, (rows, 12), generator=torch.Generator().manual_seed(1))


def test_token_nats_equal_cross_entropy_by_hand(model: Any) -> None:
    tokens = blocks()
    model.eval()
    with torch.no_grad():
        probabilities = model(tokens).logits.double().softmax(-1)
    expected = [
        [-math.log(probabilities[row, place - 1, tokens[row, place]]) for place in range(1, 12)] for row in range(7)
    ]
    nats = token_nats(model, tokens)
    assert nats.shape == (7, 11)
    torch.testing.assert_close(nats.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    loss = nats_per_token(model, tokens)
    assert loss.tokens == 77
    assert loss.nats == pytest.approx(sum(map(sum, expected)) / 77, rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(loss.nats))


def test_batch_size_does_not_change_the_result(model: Any) -> None:
    one, three, hundred = (token_nats(model, blocks(), batch_size=size) for size in (1, 3, 100))
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, hundred, rtol=1e-5, atol=1e-5)
    assert torch.equal(one, token_nats(model, blocks(), batch_size=1))


def test_dropout_is_off_and_the_mode_is_restored(model: Any) -> None:
    expected = token_nats(model.eval(), blocks())
    assert torch.equal(expected, token_nats(model.train(), blocks()))
    assert model.training
    token_nats(model.eval(), blocks())
    assert not model.training


def test_the_embedded_model_predicts_python() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    tokens = blocks_from("builtin", tokenizer, split="heldout", length=256, count=8)
    loss = nats_per_token(model, tokens)
    assert loss.tokens == 8 * 255
    assert 1.2 < loss.nats < 2.6  # 1.77 over all held-out modules at a length of 1024


def test_the_embedded_model_has_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in Path(EMBEDDED_MODEL).iterdir()) <= 10_000_000


def test_nats_of_targets_equal_one_pair_at_a_time() -> None:
    """The padding of a batch changes nothing, and no loss counts padding."""
    network, _ = tiny_models.build("t5gemma")
    sources = [[5, 6, 7, 8, 9], [10, 11], [12] * 9]
    targets = [[1, 20, 21, 2], [1, 22, 23, 24, 25, 26, 2], [1, 2]]
    pairs = Pairs(*pad(sources, 11, 0), *pad(targets, 8, 0))
    nats = pair_nats(network, pairs, batch_size=2)
    assert nats.shape == (3, 7) and not nats[~pairs.predicted].any()
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        with torch.no_grad():
            logits = network(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target[:-1]]), use_cache=False
            ).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(target[1:]), reduction="none")
        torch.testing.assert_close(nats[row, : len(target) - 1], expected, rtol=1e-4, atol=1e-5)
    loss = nats_per_token(network, pairs)
    assert loss.tokens == 10 and loss.nats == pytest.approx(float(nats.sum()) / 10, rel=1e-5)
