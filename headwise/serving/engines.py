"""Check which serving engines load a converted model, by the rules of engines.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

# Numbers of layers for which llama.cpp expects a direct query projection.
DIRECT_QUERY_DEPTHS = (26, 27, 48)
# Largest relative distance between a wanted cache row and the one that replaces it.
NEAR = 0.2
SEVERITY = ("no", "wrong", "unread")
VERDICTS = {"yes": "loads", "no": "does not load", "wrong": "loads, and computes another function"}


@dataclass(frozen=True)
class EngineVerdict:
    """Whether one engine loads a model.

    Attributes:
        name: of the engine.
        loads: "yes"; "no": it stops with an error; "wrong": it loads the model and computes another function;
            "unread": its source was not read for such a config.
        reason: the rules that the config breaks; empty for "yes".
        read: the version and files from which the rules were read.
    """

    name: str
    loads: str
    reason: str
    read: str

    @property
    def line(self) -> str:
        """Return the verdict as a line of a plan."""
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.name}: {VERDICTS.get(self.loads, 'not known')}{reason}"


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath("engines.yaml").read_text("utf-8"))
    return table


def engine_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a config that the rules check.

    Args:
        config: the config.json of a DeepseekV3.
    """
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
    """Check a config against the rules of every engine.

    Args:
        config: the config.json of a DeepseekV3.

    Returns:
        One verdict for each engine of the table; the most severe broken rule decides it.
    """
    facts = engine_facts(config)
    verdicts = []
    for engine in _table()["engines"]:
        broken = [rule for rule in engine["rules"] if facts[rule["fact"]] not in rule["allowed"]]
        broken.sort(key=lambda rule: SEVERITY.index(rule["otherwise"]))
        reason = "; ".join(f"{rule['fact']} is {facts[rule['fact']]}: {rule['reason']}" for rule in broken)
        loads = broken[0]["otherwise"] if broken else "yes"
        verdicts.append(EngineVerdict(engine["name"], loads, reason, engine["read"]))
    return verdicts


def window_verdicts(stock_class: str) -> list[EngineVerdict]:
    """Return what engines do with a stock class that has a sliding window.

    Args:
        stock_class: the name in `architectures`.

    Returns:
        One verdict for each engine; none for a class without an entry in the table.
    """
    return [EngineVerdict(**row) for row in _table()["windows"].get(stock_class, ())]


def nearest_cache_row(size: int) -> int:
    """Return the nearest cache row for which MLA engines have kernels, or `size` made even if none is near.

    Args:
        size: wanted elements per token and layer (kv_lora_rank + qk_rope_head_dim).
    """
    nearest: int = min(_table()["cache_rows"], key=lambda row: abs(row - size))
    return nearest if abs(nearest - size) <= NEAR * size else size // 2 * 2


def rank_splits(size: int, rotary_dim: int, num_key_value_heads: int) -> list[tuple[int, int]]:
    """Return the pairs (kv_lora_rank, qk_rope_head_dim) to try for a cache row.

    Args:
        size: elements of the row; each pair has this sum.
        rotary_dim: of the source; the rotary widths lie between a quarter of it and twice it.
        num_key_value_heads: of the source, whose rotary dimensions together are the upper limit.
    """
    dims = {max(rotary_dim * quarters // 8 * 2, 2) for quarters in (1, 2, 3, 4, 6, 8)}
    limit = min(rotary_dim * num_key_value_heads, size // 2)
    return [(size - dim, dim) for dim in sorted(dims) if dim <= limit]
