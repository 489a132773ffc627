"""Diagnostics: nothing where nothing differs, everything where one layer's heads are shuffled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.demo.demo import MODEL
from headwise.eval import model as models
from headwise.eval.metrics import generation
from headwise.eval.metrics.acceptance import acceptance
from headwise.eval.stats import paired_ratio
from headwise.measure.divergence import diagnose, head_entropy, walk
from headwise.measure.loss import token_nats
from headwise.text.blocks import blocks_from
from tests import tiny_models

HOW = {"dtype": "float32", "device": "cpu", "eager": True}


def test_entropy_of_known_attention() -> None:
    length = 32
    causal = torch.ones(length, length).tril()
    uniform = causal / causal.sum(-1, keepdim=True)
    first = torch.zeros(length, length)
    first[:, 0] = 1
    half = torch.zeros(length, length)
    half[:, :2] = 0.5
    entropy = head_entropy(torch.stack([uniform, first, half]))
    by_hand = sum(math.log(2) / math.log(seen) for seen in range(17, 33)) / 16
    assert entropy.tolist() == pytest.approx([1.0, 0.0, by_hand], abs=1e-6)


def test_a_window_bounds_what_a_query_can_see() -> None:
    band = torch.ones(32, 32).tril().triu(-3)
    assert float(head_entropy((band / band.sum(-1, keepdim=True))[None])) == pytest.approx(1.0)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "falcon", "gemma2", "phi3"])
def test_the_walk_is_the_models_own_forward(model_type: str, tmp_path: Path) -> None:
    model = models.find(tiny_models.save(model_type, tmp_path / "model"))
    loaded = models.load(model, **HOW)
    tokens = tiny_models.tokens(20)[:1]
    with torch.inference_mode():
        seen = list(walk(loaded, model.stock, tokens))
        whole = loaded(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    for own, other in zip(seen[:-1], whole[1:-1], strict=True):  # the last one of these is behind the final norm
        torch.testing.assert_close(own.hidden, other)
    heads = loaded.config.num_attention_heads
    assert all(one.weights is not None and one.weights.shape == (heads, 20, 20) for one in seen)


@pytest.fixture(scope="module")
def embedded() -> dict[str, Any]:
    model = models.find(MODEL)
    tokenizer = models.tokenizer_of(model)
    parent, shuffled = models.load(model, **HOW), models.load(model, **HOW)
    attention = shuffled.model.layers[1].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        heads = projection.weight.data.unflatten(0, (8, -1))
        projection.weight.data = heads.roll(3, 0).flatten(0, 1).contiguous()
    return {
        "parent": parent,
        "twin": models.load(model, **HOW),
        "shuffled": shuffled,
        "stock": model.stock,
        "tokenizer": tokenizer,
        "blocks": blocks_from("builtin", tokenizer, split="heldout", length=192, count=5),
        "prompts": generation.prompts_of(tokenizer, 16, 32, seed=0),
    }


def seen(embedded: dict[str, Any], child: str) -> Any:
    stock = embedded["stock"]
    return diagnose(
        embedded[child],
        embedded["parent"],
        embedded["blocks"],
        layer_blocks=1,
        child_stock=stock,
        parent_stock=stock,
    )


def test_a_twin_shows_nothing(embedded: dict[str, Any]) -> None:
    found = seen(embedded, "twin")
    assert (found.kl, found.kl_p99, found.top1, found.top5, found.tokens) == (0, 0, 1, 1, 5 * 191)
    assert all((layer.hidden, layer.attention) == (0, 0) for layer in found.layers)
    assert found.entropy.child == found.entropy.parent
    assert not (found.entropy.changed or found.entropy.collapsed or found.entropy.uniform)


def test_where_one_layers_heads_are_shuffled_everything_fires(embedded: dict[str, Any]) -> None:
    found = seen(embedded, "shuffled")
    assert found.kl > 0.1 and found.kl > 5 * found.kl_standard_error and found.kl_p99 > found.kl
    assert found.top1 < 0.9 and found.top5 < 0.9
    # The layer is named: before it nothing differs.
    assert (found.layers[0].hidden, found.layers[0].attention) == (0, 0)
    assert found.layers[1].attention > 0.2 and all(layer.hidden > 0.05 for layer in found.layers[1:])
    assert found.entropy.changed and {head.layer for head in found.entropy.changed} >= {1}
    assert found.entropy.child[0] == found.entropy.parent[0]

    child, parent = (token_nats(embedded[name], embedded["blocks"]).sum(1) for name in ("shuffled", "parent"))
    assert paired_ratio(child, parent, torch.full((5,), 191)).above(math.log(1.01)) < 0.05

    writes = [generation.continuations(embedded[name], embedded["prompts"], 16) for name in ("shuffled", "parent")]
    judged = generation.judge(embedded["prompts"], *writes, 16, embedded["tokenizer"])
    assert judged.complaints and judged.identical == 0

    drafts = acceptance(
        embedded["shuffled"], embedded["parent"], embedded["prompts"][:2], new_tokens=16, draft_tokens=4
    )
    assert drafts.rate < 0.8 and drafts.exact == 1


def test_a_residual_stream_of_another_scale_is_no_error(embedded: dict[str, Any]) -> None:
    twin = embedded["twin"]
    weights = [twin.model.embed_tokens.weight]
    for layer in twin.model.layers:
        weights += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    scaled = [weight.data.clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.mul_(4)
        found = seen(embedded, "twin")
    finally:
        for weight, before in zip(weights, scaled, strict=True):
            weight.data.copy_(before)
    assert all(layer.hidden < 0.02 for layer in found.layers)


def test_models_of_other_depth_are_compared_by_their_words_alone(tmp_path: Path) -> None:
    first = models.find(tiny_models.save("llama", tmp_path / "one"))
    second = models.find(tiny_models.save("llama", tmp_path / "two", num_hidden_layers=3))
    found = diagnose(
        models.load(first, **HOW), models.load(second, **HOW), tiny_models.tokens(12), layer_blocks=1,
        child_stock=first.stock, parent_stock=second.stock,
    )  # fmt: skip
    assert found.layers == () and found.entropy is None and found.kl > 0
