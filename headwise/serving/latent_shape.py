"""Shape MLA heads and queries for the engines that a user names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from headwise.io.quantized.powers import POWERS
from headwise.models import deepseek
from headwise.models.layout import AttentionLayout
from headwise.models.mla_source import find_mla_source
from headwise.serving.engines import needs_factored_queries, padded_head_dims, stores_powers


def pad_layout(layout: AttentionLayout, engines: Collection[str], v_head_dim: int = 0) -> AttentionLayout:
    """Return an MLA layout with the heads padded for the engines that a user names.

    Args:
        layout: of the MLA layer.
        engines: names of the engines.
        v_head_dim: the smallest width of the values.
    """
    rope_dim = layout.rotary_dim
    nope, value = padded_head_dims(
        layout.head_dim - rope_dim,
        rope_dim,
        max(layout.v_head_dim, v_head_dim),
        engines,
        layout.cache_elements_per_token,
    )
    return replace(layout, head_dim=nope + rope_dim, v_head_dim=value)


def query_factors(
    layout: AttentionLayout,
    hidden_size: int,
    vocab_size: int,
    num_hidden_layers: int,
    engines: Collection[str],
    biased: bool,
) -> int | None:
    """Return the rank of the queries in two factors that a conversion writes; None: one projection.

    Args:
        layout: of the MLA layer.
        hidden_size: of the model.
        vocab_size: of the model.
        num_hidden_layers: of the model.
        engines: names of the engines to serve.
        biased: whether the source's queries, keys and values have biases.
    """
    if biased:
        return deepseek.query_rank(layout, hidden_size)
    return hidden_size if needs_factored_queries(num_hidden_layers, vocab_size, engines) else None


def latent_config(
    source: Mapping[str, Any], layout: AttentionLayout, engines: Collection[str], biased: bool
) -> dict[str, Any]:
    """Return the config.json that a conversion to an MLA shape writes, for forecasts and the rules about engines.

    Args:
        source: the fields of the source's stock config.
        layout: of the MLA layer, with its heads padded.
        engines: names of the engines to serve.
        biased: whether the source's queries, keys and values have biases.
    """
    rule = find_mla_source(source)
    theta = 10_000.0
    sizes = (source["hidden_size"], source["vocab_size"], source["num_hidden_layers"])
    written = deepseek.make_config(
        source,
        layout,
        theta=theta,
        frequencies=deepseek.default_grid(theta, layout.rotary_dim),
        attention_bias=biased or bool(source.get("attention_bias")),
        q_lora_rank=query_factors(layout, *sizes, engines, biased),
        stock=rule.stock,
        experts=rule.experts,
    )
    return with_powers(written, engines)


def with_powers(config: dict[str, Any], engines: Collection[str]) -> dict[str, Any]:
    """Return the config.json of a conversion to MLA with an entry for the powers of two, if it stores any.

    Args:
        config: what it writes otherwise.
        engines: names of the engines to serve.
    """
    if not stores_powers(config, engines):
        return config
    return {**config, POWERS: {deepseek.INPUT_NORM: -1}}  # the weights decide how many
