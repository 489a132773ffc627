"""Shape MLA heads and queries for the engines that a user names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from headwise.models import deepseek
from headwise.models.layout import AttentionLayout
from headwise.models.mla_source import find_mla_source
from headwise.serving.engines import needs_factored_queries, padded_head_dims


def pad_layout(layout: AttentionLayout, engines: Collection[str], v_head_dim: int = 0) -> AttentionLayout:
    """Return an MLA layout with the heads padded for the engines that a user names.

    Args:
        layout: of the MLA layer.
        engines: names of the engines.
        v_head_dim: the smallest width of the values.
    """
    rope_dim = layout.rotary_dim
    nope, value = padded_head_dims(
        layout.head_dim - rope_dim, rope_dim, max(layout.v_head_dim, v_head_dim), engines
    )
    return replace(layout, head_dim=nope + rope_dim, v_head_dim=value)


def latent_config(source: Mapping[str, Any], layout: AttentionLayout, engines: Collection[str]) -> dict[str, Any]:
    """Return the config.json that a conversion to an MLA shape writes, for the rules about engines.

    Args:
        source: the fields of the source's stock config.
        layout: of the MLA layer.
        engines: names of the engines to serve.
    """
    rule = find_mla_source(source)
    theta = 10_000.0
    factored = needs_factored_queries(source["num_hidden_layers"], source["vocab_size"], engines)
    return deepseek.make_config(
        source,
        pad_layout(layout, engines),
        theta=theta,
        frequencies=deepseek.default_grid(theta, layout.rotary_dim),
        attention_bias=bool(source.get("attention_bias")),
        q_lora_rank=source["hidden_size"] if factored else None,
        stock=rule.stock,
        experts=rule.experts,
    )
