"""An indexer in stock tensors: its scores are those of the stock module, beside their reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

from headwise.convert.sparse.indexer import (
    IndexerWeights,
    index_scores,
    indexer_tensors,
    query_scale,
    read_indexer,
    select,
)
from headwise.models.deepseek import NORM_EPS, default_grid

HEADS, WIDTH, ROPE, HIDDEN, TOKENS, THETA = 3, 11, 6, 10, 17, 50.0
PREFIX = "model.layers.0.self_attn"


def weights(biased: bool, seed: int = 0) -> IndexerWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, bias = random(WIDTH, HIDDEN), random(WIDTH)
    keys[-1], bias[-1] = 0, 1
    return IndexerWeights(
        random(HEADS, WIDTH, HIDDEN + biased), keys, bias, random(HEADS, HIDDEN), default_grid(THETA, ROPE)
    )


def stock(indexer: IndexerWeights, x: Tensor, budget: int) -> tuple[Tensor, IndexerWeights]:
    """The keys that the stock module selects, and the weights read back from its tensors."""
    inputs = indexer.queries.shape[2]
    config = DeepseekV32Config(
        hidden_size=HIDDEN, q_lora_rank=inputs, num_attention_heads=2, qk_rope_head_dim=ROPE, qk_nope_head_dim=4,
        kv_lora_rank=5, v_head_dim=3, index_topk=budget, index_n_heads=HEADS, index_head_dim=WIDTH,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, attention_bias=inputs > HIDDEN,
    )  # fmt: skip
    module: Any = DeepseekV32Attention(config, 0).double()
    first = torch.zeros(inputs, HIDDEN, dtype=torch.float64)
    first[:HIDDEN] = 2.0**-13 * torch.eye(HIDDEN)
    norm = torch.full((inputs,), 2.0**4, dtype=torch.float64)
    state = {f"{PREFIX}.q_a_proj.weight": first, f"{PREFIX}.q_a_layernorm.weight": norm}
    scale = query_scale(state, PREFIX, NORM_EPS)
    moment = (x.mT @ x).mean(0) / TOKENS
    state |= indexer_tensors(indexer, PREFIX, scale, moment=moment, dtype=torch.float64)
    if inputs > HIDDEN:
        bias = torch.zeros(inputs, dtype=torch.float64)
        bias[-1] = 2.0**-13
        state[f"{PREFIX}.q_a_proj.bias"] = bias
    own = {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in state.items()}
    missing, unexpected = module.load_state_dict(own, strict=False)
    assert not unexpected and not any("indexer" in name for name in missing)
    positions = torch.arange(TOKENS)[None]
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None].expand(len(x), -1, -1)
    q_resid = module.q_a_layernorm(module.q_a_proj(x))
    embedded = DeepseekV32RotaryEmbedding(config)(x, positions)
    chosen = module.indexer(x, q_resid, embedded, mask, positions).long()
    return chosen, read_indexer(state, PREFIX, HEADS, scale, indexer.frequencies)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("budget", [1, 5])
def test_the_stock_module_selects_the_keys_of_the_best_scores(biased: bool, budget: int) -> None:
    indexer = weights(biased)
    x = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        chosen, read = stock(indexer, x, budget)
        expected = select(index_scores(indexer, x), budget)
        again = select(index_scores(read, x), budget)
    past = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    actual = torch.zeros(2, TOKENS, TOKENS, dtype=torch.bool).scatter(-1, chosen, True) & past
    assert torch.equal(actual, expected) and torch.equal(again, expected)
    assert torch.equal(expected.sum(-1)[0], torch.arange(1, TOKENS + 1).clamp_max(budget))


@pytest.mark.parametrize("biased", [False, True])
def test_stock_tensors_hold_the_weights(biased: bool) -> None:
    indexer = weights(biased, seed=2)
    moment = torch.eye(HIDDEN, dtype=torch.float64)
    tensors = indexer_tensors(indexer, PREFIX, 3.7, moment=moment, dtype=torch.float64)
    read = read_indexer(tensors, PREFIX, HEADS, 3.7, indexer.frequencies)
    for name, tensor in vars(indexer).items():
        assert torch.allclose(getattr(read, name), tensor, atol=1e-12), name


def test_scores_of_some_queries_are_those_of_all() -> None:
    indexer = weights(True)
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    some = torch.tensor([3, 16, 7])
    assert torch.allclose(index_scores(indexer, x, some), index_scores(indexer, x)[:, some])
    assert torch.equal(
        select(index_scores(indexer, x, some), 4, some), select(index_scores(indexer, x), 4)[:, some]
    )
