"""Which serving engines load a converted MLA model, and why (engines.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

# Layer counts for which llama.cpp expects a direct query projection.
DIRECT_QUERY_DEPTHS = (26, 27, 48)
# How far from what was asked for an engine's cache row may be and still be offered in its place.
NEAR = 0.2
SEVERITY = ("no", "wrong", "unread")


@dataclass(frozen=True)
class EngineVerdict:
    """One line of the plan's table.

    `loads`: "yes"; "no": it stops with an error; "wrong": it loads and computes another function; "unread": its
    source was not read for this config. `read` names the version that the answer holds for.
    """

    name: str
    loads: str
    reason: str
    read: str


@cache
def _table() -> dict[str, Any]:
    return yaml.safe_load(resources.files(__package__).joinpath("engines.yaml").read_text("utf-8"))


def engine_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the rules look at, of a DeepseekV3 `config.json`."""
    direct = config.get("q_lora_rank") is None
    return {
        "cache_row": config["kv_lora_rank"] + config["qk_rope_head_dim"],
        "attention_bias": config.get("attention_bias", False),
        "rope_type": config["rope_parameters"]["rope_type"],
        "rope_interleave": config.get("rope_interleave", True),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "rms_norm_eps": config["rms_norm_eps"],
        "hidden_act": config.get("hidden_act", "silu"),
        "direct_queries_of_unknown_depth": direct and config["num_hidden_layers"] not in DIRECT_QUERY_DEPTHS,
    }


def engine_verdicts(config: Mapping[str, Any]) -> list[EngineVerdict]:
    """Every engine of the table and whether it loads this config."""
    known = engine_facts(config)
    found = []
    for engine in _table()["engines"]:
        broken = [rule for rule in engine["rules"] if known[rule["fact"]] not in rule["allowed"]]
        broken.sort(key=lambda rule: SEVERITY.index(rule["otherwise"]))
        reason = "; ".join(f"{rule['fact']} is {known[rule['fact']]}: {rule['reason']}" for rule in broken)
        found.append(EngineVerdict(engine["name"], broken[0]["otherwise"] if broken else "yes", reason, engine["read"]))
    return found


def nearest_cache_row(cache: int) -> int:
    """The cache row nearest to `cache` that MLA engines accept, or `cache` made even if none is near."""
    nearest = min(_table()["cache_rows"], key=lambda row: abs(row - cache))
    return nearest if abs(nearest - cache) <= NEAR * cache else cache // 2 * 2


def rank_splits(cache: int, rotary_dim: int, num_key_value_heads: int) -> list[tuple[int, int]]:
    """(rank, rope_dim) pairs worth trying for a cache: rope dims from a quarter of the source's to twice it."""
    dims = {max(rotary_dim * quarters // 8 * 2, 2) for quarters in (1, 2, 3, 4, 6, 8)}
    limit = min(rotary_dim * num_key_value_heads, cache // 2)
    return [(cache - dim, dim) for dim in sorted(dims) if dim <= limit]
