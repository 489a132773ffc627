"""Nats per token, against cross-entropy by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.demo.demo import MODEL
from headwise.measure import loss as perplexity
from headwise.measure.loss import nats_per_token, token_nats


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


def test_matches_cross_entropy_by_hand(model: Any) -> None:
    given = blocks()
    model.eval()
    with torch.no_grad():
        chances = model(given).logits.double().softmax(-1)
    by_hand = [
        [-math.log(chances[row, place - 1, given[row, place]]) for place in range(1, 12)] for row in range(7)
    ]
    found = token_nats(model, given)
    assert found.shape == (7, 11)
    torch.testing.assert_close(found.double(), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    result = nats_per_token(model, given)
    assert result.tokens == 77
    assert result.nats == pytest.approx(sum(map(sum, by_hand)) / 77, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats))


def test_batch_size_does_not_matter(model: Any) -> None:
    one, three, all_at_once = (token_nats(model, blocks(), batch_size=size) for size in (1, 3, 100))
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, all_at_once, rtol=1e-5, atol=1e-5)
    assert torch.equal(one, token_nats(model, blocks(), batch_size=1))


def test_measures_without_dropout_and_leaves_the_mode_as_it_was(model: Any) -> None:
    quiet = token_nats(model.eval(), blocks())
    assert torch.equal(quiet, token_nats(model.train(), blocks()))
    assert model.training
    token_nats(model.eval(), blocks())
    assert not model.training


def test_the_embedded_model_has_learned_python(capsys: pytest.CaptureFixture[str]) -> None:
    perplexity.main([str(MODEL), "--count", "8", "--length", "256", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 8 * 255
    assert 1.2 < result["nats"] < 2.6  # 1.77 over all of the held-out modules at a length of 1024


def test_the_embedded_model_fits_its_room() -> None:
    assert sum(path.stat().st_size for path in Path(MODEL).iterdir()) <= 10_000_000
