"""Indexers of a layer: the attention that they learn from, the closed form, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.convert.mla.exact import exact_mla
from headwise.convert.sparse.indexer import index_scores, select
from headwise.convert.sparse.warm_up import summed_attention, train_indexer
from headwise.convert.verify.factored import latent_attention
from headwise.models.deepseek import default_grid
from headwise.models.layout import IndexerShape, LatentWeights
from tests.convert.mla.samples import THETA, random_source

HIDDEN, TOKENS = 20, 33


def layer(rotary: int = 6, bias: bool = False) -> LatentWeights:
    weights, _ = random_source(3, 3, 6, HIDDEN, rotary=rotary, bias=bias)
    return exact_mla(weights, default_grid(THETA, rotary), scale=6**-0.5)


def text(sequences: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs whose mean is far from zero, as those of models are, and their moment."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sequences, TOKENS, HIDDEN, generator=generator) + 1.0
    one = torch.cat([x, torch.ones_like(x[..., :1])], -1).double().flatten(0, 1)
    return x, one.T @ one / len(one)


@pytest.mark.parametrize("bias", [False, True])
def test_the_summed_attention_is_that_of_the_layer(bias: bool) -> None:
    """Attention weights times values, through the output matrices, are the output of the layer."""
    latent = layer(rotary=4, bias=bias)
    x = text()[0][0].double()
    positions = torch.tensor([0, 7, 32])
    weights, partition = summed_attention(latent, x, positions)
    assert torch.allclose(weights.sum(-1), torch.ones(3, dtype=torch.float64)) and partition.shape == (3, 3)
    inputs = torch.cat([x, torch.ones_like(x[:, :1])], -1) if bias else x
    # Values and output matrices that are the same for all heads: the layer's output is then their mean.
    same = torch.eye(latent.v_up.shape[2], dtype=torch.float64)[None].expand(3, -1, -1)
    out = torch.randn(1, HIDDEN, len(same[0]), dtype=torch.float64).expand(3, -1, -1) / 3
    one = LatentWeights(**{**vars(latent), "v_up": same, "o": out})
    expected = latent_attention(one, x[None])[0, positions]
    assert torch.allclose(weights @ (inputs @ latent.kv_down.T) @ (3 * out[0]).T, expected)


@pytest.mark.parametrize("rotary", [6, 2])
def test_the_closed_form_of_all_directions_orders_keys_as_one_head_does(rotary: int) -> None:
    """With one attention head and room for every direction, the selection is that of the attention itself."""
    weights, _ = random_source(1, 1, 6, HIDDEN, rotary=rotary)
    latent = exact_mla(weights, default_grid(THETA, rotary), scale=6**-0.5)
    x, moment = text()
    indexer, report = train_indexer(latent, IndexerShape(5, 1, rotary + 11), moment, x, steps=0)
    scores = index_scores(indexer, x.double())[0]
    positions = torch.arange(TOKENS)
    attention, _ = summed_attention(latent, x[0].double(), positions)
    chosen, best = select(scores, 5), select(attention, 5)
    # ReLU makes ties of the keys that get next to no attention, and a weight of the wrong sign turns the order.
    agreed = (attention * chosen).sum(-1) / (attention * best).sum(-1)
    assert float(agreed.median()) == pytest.approx(1, abs=1e-9)
    assert report.recall_before == report.recall_after <= report.recall_best + 1e-6


def test_training_selects_more_of_the_attention_and_is_reproducible() -> None:
    latent = layer(rotary=4)
    x, moment = text(12)
    shape = IndexerShape(4, 2, 15)  # fewer queries than heads, and too few elements for all directions
    results: list[Any] = [train_indexer(latent, shape, moment, x, steps=60, seed=5) for _ in range(2)]
    (indexer, report), (again, _) = results
    assert report.kept and report.kl_after < report.kl_before and report.recall_after > report.recall_before
    assert torch.equal(indexer.queries, again.queries) and indexer.queries.dtype == torch.float64
    assert not bool(indexer.keys[-1].any()) and float(indexer.key_bias[-1]) == 1


def test_more_queries_than_heads_cut_off_at_different_scores() -> None:
    x, moment = text()
    indexer, _ = train_indexer(layer(), IndexerShape(4, 7, 25), moment, x, steps=0)
    shifts = indexer.queries[:, -1].norm(dim=-1)
    assert len({round(float(shift), 6) for shift in shifts}) == 7
    assert torch.equal(indexer.queries[0, :-1], indexer.queries[3, :-1])
