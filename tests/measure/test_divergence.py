"""Divergence: zero for equal models, and every measure is above zero if the heads of one layer are permuted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.eval.metrics.acceptance import measure_acceptance
from headwise.eval.metrics.generation import assess_generation, select_prompts, write_continuations
from headwise.eval.model import find_model
from headwise.eval.stats import paired_ratio
from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.divergence import Divergence, iter_layer_outputs, measure_divergence
from headwise.measure.loss import token_nats
from headwise.text.blocks import blocks_from
from tests import tiny_models

LOADED: dict[str, Any] = {"dtype": "float32", "device": "cpu", "eager": True}


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt_neox", "falcon", "gemma2", "phi3", "llava", "mllama", "qwen3_next"]
)
def test_layer_outputs_equal_the_forward_pass_of_the_model(model_type: str, tmp_path: Path) -> None:
    model = find_model(tiny_models.save(model_type, tmp_path / "model"))
    loaded = model.load(**LOADED)
    tokens = tiny_models.tokens(20)[:1]
    with torch.inference_mode():
        layers = list(iter_layer_outputs(loaded, model.architecture, tokens))
        expected = loaded(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    text = loaded.config.get_text_config()
    left_out = set(getattr(text, "cross_attention_layers", ()))
    left_out |= {n for n, kind in enumerate(getattr(text, "layer_types", None) or ()) if kind == "linear_attention"}
    assert [layer.layer for layer in layers] == [n for n in range(text.num_hidden_layers) if n not in left_out]
    for layer in layers:
        if layer.layer < text.num_hidden_layers - 1:  # the last one is behind the final norm
            torch.testing.assert_close(layer.hidden, expected[layer.layer + 1])
    heads = text.num_attention_heads
    assert all(layer.weights is not None and layer.weights.shape == (heads, 20, 20) for layer in layers)


@pytest.fixture(scope="module")
def embedded() -> dict[str, Any]:
    """The embedded model three times; `permuted` has the KV heads of layer 1 in another order."""
    model = find_model(EMBEDDED_MODEL)
    tokenizer = model.load_tokenizer()
    parent, permuted = model.load(**LOADED), model.load(**LOADED)
    attention = permuted.model.layers[1].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        heads = projection.weight.data.unflatten(0, (8, -1))
        projection.weight.data = heads.roll(3, 0).flatten(0, 1).contiguous()
    return {
        "parent": parent,
        "twin": model.load(**LOADED),
        "permuted": permuted,
        "architecture": model.architecture,
        "tokenizer": tokenizer,
        "blocks": blocks_from("builtin", tokenizer, split="heldout", length=192, count=5),
        "prompts": select_prompts(tokenizer, 16, 32, seed=0),
    }


def compare(embedded: dict[str, Any], child: str) -> Divergence:
    return measure_divergence(
        embedded[child],
        embedded["parent"],
        embedded["blocks"],
        num_layer_blocks=1,
        child_architecture=embedded["architecture"],
        parent_architecture=embedded["architecture"],
    )


def test_equal_models_do_not_differ(embedded: dict[str, Any]) -> None:
    result = compare(embedded, "twin")
    assert (result.kl, result.kl_p99, result.top1, result.top5, result.tokens) == (0, 0, 1, 1, 5 * 191)
    assert all((layer.hidden, layer.attention) == (0, 0) for layer in result.layers)
    assert result.entropy and result.entropy.child == result.entropy.parent
    assert not (result.entropy.changed or result.entropy.collapsed or result.entropy.uniform)


def test_every_measure_finds_the_permuted_heads_of_one_layer(embedded: dict[str, Any]) -> None:
    result = compare(embedded, "permuted")
    assert result.kl_standard_error is not None and result.entropy is not None
    assert result.kl > 0.1 and result.kl > 5 * result.kl_standard_error and result.kl_p99 > result.kl
    assert result.top1 < 0.9 and result.top5 < 0.9
    # Layers before the permuted one do not differ.
    assert (result.layers[0].hidden, result.layers[0].attention) == (0, 0)
    assert result.layers[1].attention > 0.2 and all(layer.hidden > 0.05 for layer in result.layers[1:])
    assert result.entropy.changed and {head.layer for head in result.entropy.changed} >= {1}
    assert result.entropy.child[0] == result.entropy.parent[0]

    child, parent = (token_nats(embedded[name], embedded["blocks"]).sum(1) for name in ("permuted", "parent"))
    assert paired_ratio(child, parent, torch.full((5,), 191)).above(math.log(1.01)) < 0.05

    written = [write_continuations(embedded[name], embedded["prompts"], 16) for name in ("permuted", "parent")]
    generation = assess_generation(embedded["prompts"], *written, 16, embedded["tokenizer"])
    assert generation.complaints and generation.identical == 0

    drafts = measure_acceptance(
        embedded["permuted"], embedded["parent"], embedded["prompts"][:2], new_tokens=16, draft_tokens=4
    )
    assert drafts.rate < 0.8


def test_a_scaled_residual_stream_is_not_an_error(embedded: dict[str, Any]) -> None:
    twin = embedded["twin"]
    weights = [twin.model.embed_tokens.weight]
    for layer in twin.model.layers:
        weights += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    before = [weight.data.clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.mul_(4)
        result = compare(embedded, "twin")
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)
    assert all(layer.hidden < 0.02 for layer in result.layers)


def test_models_of_different_depth_are_compared_without_layers(tmp_path: Path) -> None:
    first = find_model(tiny_models.save("llama", tmp_path / "one"))
    second = find_model(tiny_models.save("llama", tmp_path / "two", num_hidden_layers=3))
    result = measure_divergence(
        first.load(**LOADED),
        second.load(**LOADED),
        tiny_models.tokens(12),
        num_layer_blocks=1,
        child_architecture=first.architecture,
        parent_architecture=second.architecture,
    )
    assert result.layers == () and result.entropy is None and result.kl > 0
