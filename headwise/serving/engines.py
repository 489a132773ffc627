"""Decide which serving engines load a model, with which command and why, by the rules of engines.yaml."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from headwise.errors import SettingError
from headwise.serving.engine_facts import (
    NOT_KNOWN,
    Deployment,
    engine_facts,
    has_direct_query_depth,
    has_linear_norm,
)

# The files with the rules.
FILES = ("engines.yaml", "vllm.yaml")
# The engines of these files, for settings and shell completion, which read no YAML.
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")
# The options of an engine's server for the settings of a forecast, and its names of cache types.
SERVING_OPTIONS = {
    "vllm": {
        "tp": "--tensor-parallel-size",
        "dcp": "--decode-context-parallel-size",
        "cache_dtype": "--kv-cache-dtype",
        "context": "--max-model-len",
    },
    "sglang": {
        "tp": "--tp",
        "dcp": "--dcp-size",
        "cache_dtype": "--kv-cache-dtype",
        "context": "--context-length",
    },
    "llama.cpp": {"context": "--ctx-size"},
}
CACHE_NAMES: Mapping[tuple[str, int | str | None], str] = {("sglang", "fp8"): "fp8_e4m3"}
# Largest relative distance between a wanted cache row and the one that replaces it.
NEAR = 0.2
SEVERITY = ("no", "wrong", "unknown", "command", "loads")
MEANINGS = {
    "no": "does not load",
    "refused": "is not served with these options",
    "wrong": "loads, and computes another function",
    "unknown": "not known",
    "command": "loads with this command",
    "loads": "loads",
}


@dataclass(frozen=True)
class EngineVerdict:
    """Whether one engine loads a model.

    Attributes:
        name: of the engine.
        verdict: "loads"; "command": it loads with `commands`; "wrong": it loads and computes another function;
            "no": it stops with an error; "unknown": no rule was read for such a model; "refused": it does not
            serve the layout with the options of a forecast.
        reason: the rules that decide; empty if none apply.
        commands: shell lines that serve the folder OUT, or MODEL if that is the model itself; empty unless the
            engine loads it.
        evidence: "run", "read", both, or empty where the verdict is "unknown".
        versions: of the engine, to which the evidence applies.
        remedy: what to do where the engine does not serve the result; empty if no rule has one.
    """

    name: str
    verdict: str
    reason: str
    commands: tuple[str, ...]
    evidence: str
    versions: str
    remedy: str = ""

    @property
    def serves(self) -> bool:
        """Return whether the engine loads the model and computes its function."""
        return self.verdict in ("loads", "command")

    @property
    def line(self) -> str:
        """Return the verdict as a line of a plan."""
        reason = f" ({self.reason})" if self.reason else ""
        evidence = f" [{self.evidence}: {self.versions}]" if self.evidence else ""
        return f"{self.name}: {MEANINGS[self.verdict]}{reason}{evidence}"

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data; what only messages need is left out."""
        plain = {name: value for name, value in asdict(self).items() if name != "remedy"}
        return plain | {"commands": list(self.commands)}


@cache
def _table() -> dict[str, Any]:
    import yaml  # takes longer to import than `headwise --help` may

    texts = (resources.files(__package__).joinpath(name).read_text("utf-8") for name in FILES)
    table = {engine["name"]: engine for text in texts for engine in yaml.safe_load(text)["engines"]}
    return {name: table[name] for name in ENGINES}


def engine_verdicts(
    config: Mapping[str, Any],
    *,
    window: bool = False,
    tokenizer: str = "none",
    engines: Collection[str] = (),
    folder: str = "OUT",
    deployment: Deployment = NOT_KNOWN,
) -> tuple[EngineVerdict, ...]:
    """Check a model against the rules of the engines.

    Args:
        config: the config.json.
        window: whether a layer has a sliding window.
        tokenizer: the kind of its vocabulary.
        engines: names of the engines to check; empty: all of them.
        folder: the folder that the commands name.
        deployment: of the server.

    Returns:
        One verdict for each engine; the most severe rule that applies decides it.
    """
    facts = engine_facts(config, window=window, tokenizer=tokenizer, deployment=deployment)
    return tuple(_verdict(engine, facts, folder) for engine in _named(engines or ENGINES))


def with_options(verdict: EngineVerdict, options: Mapping[str, int | str | None]) -> EngineVerdict:
    """Return a verdict whose last command, the one that loads the model, has the options of a forecast.

    Args:
        verdict: of one engine.
        options: the values of "tp", "dcp", "cache_dtype" and "context"; None: not given. The command gets
            those that the engine has.
    """
    spellings = SERVING_OPTIONS.get(verdict.name, {})
    words = [
        f" {spellings[name]} {CACHE_NAMES.get((verdict.name, value), value)}"
        for name, value in options.items()
        if name in spellings and value is not None
    ]
    *before, server = verdict.commands or ("",)
    return replace(verdict, commands=(*before, server + "".join(words)) if server else ())


def refused(verdict: EngineVerdict, reason: str) -> EngineVerdict:
    """Return the verdict of an engine that does not serve a layout with the options of a forecast.

    Args:
        verdict: on the folder. One that the engine does not load at all keeps its reason.
        reason: why it does not.
    """
    if verdict.verdict == "no":
        return verdict
    return EngineVerdict(verdict.name, "refused", reason, (), "", "")


def _verdict(engine: Mapping[str, Any], facts: Mapping[str, Any], folder: str) -> EngineVerdict:
    rules = [rule for rule in engine.get("mla" if "cache_row" in facts else "grouped", ()) if _applies(rule, facts)]
    severity = min((SEVERITY.index(rule["verdict"]) for rule in rules), default=len(SEVERITY) - 1)
    verdict = SEVERITY[severity]
    name = facts["stock_class"]
    rules = [{**rule, "reason": rule["reason"].replace("{quantization}", facts["quantization"])} for rule in rules]
    covered = next((row for row in engine["classes"] if row["names"] == "all" or name in row["names"]), None)
    # The rules about MLA are those of one stock class, read in its own loader.
    if covered is None and name and (severity > SEVERITY.index("unknown") or "cache_row" in facts):
        reason = f"no rule was read for {name}"
        return EngineVerdict(engine["name"], "unknown", reason, (), "", "")
    # An engine that would stop for one reason may compute another function once that reason is gone.
    decisive = ("no", "wrong") if verdict == "no" else (verdict,)
    deciding = [rule for rule in rules if rule["verdict"] in decisive]
    sources = [_evidence(row, facts) for row in ([covered] if verdict == "loads" else deciding) if row]
    return EngineVerdict(
        name=engine["name"],
        verdict=verdict,
        reason="; ".join(dict.fromkeys(rule["reason"] for rule in deciding)),
        commands=_commands(engine, rules, folder) if verdict in ("loads", "command") else (),
        evidence=_join(evidence for evidence, _ in sources),
        versions=_join(versions for _, versions in sources),
        remedy=" ".join(dict.fromkeys(rule["remedy"] for rule in deciding if "remedy" in rule)),
    )


def _evidence(row: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the evidence of a rule or of a row of classes, and its versions: "run" where this case was run."""
    run = row.get("run", {})
    if any(all(facts.get(fact) in values for fact, values in case.items()) for case in run.get("where", ())):
        return "run", run["versions"]
    return row["evidence"], row["versions"]


def _applies(rule: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    holds = all(facts[fact] in values for fact, values in rule.get("if", {}).items())
    return holds and not any(facts[fact] in values for fact, values in rule.get("unless", {}).items())


def _commands(engine: Mapping[str, Any], rules: Iterable[Mapping[str, Any]], folder: str) -> tuple[str, ...]:
    slots: dict[str, dict[str, None]] = {"serve": {}, "quantize": {}}
    before: dict[str, None] = {}
    for rule in rules:
        before |= dict.fromkeys(rule.get("before", ()))
        for slot, words in rule.get("flags", {}).items():
            slots[slot][f" {words}"] = None
    flags = {slot: "".join(words) for slot, words in slots.items()}
    return tuple(command.format(**flags).replace("OUT", folder) for command in (*before, *engine["commands"]))


def _join(words: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, words)))


def require_engines(verdicts: Iterable[EngineVerdict], engines: Collection[str]) -> None:
    """Refuse a conversion whose result an engine that the user names cannot serve.

    Args:
        verdicts: of the result.
        engines: the engines that the user names.

    Raises:
        SettingError: one of them does not load the result, or computes another function.
    """
    for verdict in verdicts:
        if verdict.name in engines and verdict.verdict in ("no", "wrong"):
            raise SettingError(
                "engines",
                f"`engines` names {verdict.name}, which {_negation(verdict)}: {verdict.reason}.",
                verdict.remedy or f"Leave out {verdict.name}.",
            )


def _negation(verdict: EngineVerdict) -> str:
    return {"no": "does not load this result", "wrong": "computes another function of this result"}[verdict.verdict]


def require_cache_dtype(engines: Collection[str], dtype: str) -> None:
    """Refuse a cache type that an engine which the user names does not have.

    Args:
        engines: the engines that the user names.
        dtype: element type of the cache, such as "fp8".

    Raises:
        SettingError: an engine does not have it.
    """
    for name in engines:
        if dtype not in _table()[name]["cache_dtypes"]:
            raise SettingError(
                "cache_dtype",
                f"`cache_dtype` is {dtype}, and {name} has no {dtype.upper()} cache.",
                "Leave out one of the two.",
            )


def cache_rows(engines: Collection[str] = ()) -> list[int]:
    """Return the cache rows of MLA that engines serve with a cached prefix; empty: every row is alike.

    Args:
        engines: names of the engines; empty: all of them.
    """
    rows = [set(engine["cache_rows"]) for engine in _named(engines or ENGINES) if "cache_rows" in engine]
    return sorted(set.intersection(*rows) if engines and rows else set().union(*rows))


def heads_fit(nope: int, value: int) -> bool:
    """Return whether an engine whose kernels take few widths takes MLA heads of these as they are.

    Args:
        nope: position-free width of queries and keys.
        value: width of the values.
    """
    return any((nope, value) == (n, v) for engine in _table().values() for n, _, v in engine.get("head_dims", ()))


def nearest_cache_row(size: int, engines: Collection[str] = ()) -> int:
    """Return the nearest cache row that MLA engines serve in full, or `size` made even if none is near.

    Args:
        size: wanted elements per token and layer (kv_lora_rank + qk_rope_head_dim).
        engines: names of the engines to serve; empty: all of them.
    """
    nearest = min(cache_rows(engines), key=lambda row: abs(row - size), default=0)
    return nearest if abs(nearest - size) <= NEAR * size else size // 2 * 2


def padded_head_dims(nope: int, rope: int, value: int, engines: Collection[str], row: int) -> tuple[int, int]:
    """Return the widths to which MLA heads are padded for the engines that a user names.

    An engine that takes the row only with the plugin of headwise needs no padding.

    Args:
        nope: position-free width of queries and keys.
        rope: rotary width.
        value: width of the values.
        engines: names of the engines; none: nothing is padded.
        row: cache elements per token and layer.

    Returns:
        (qk_nope_head_dim, v_head_dim): the smallest that every engine takes, or the given widths if none is wide
        enough.
    """
    for engine in _named(engines):
        if row not in engine.get("cache_rows", (row,)):
            continue
        wide = [(n, v) for n, r, v in engine.get("head_dims", ()) if r == rope and n >= nope and v >= value]
        nope, value = min(wide, default=(nope, value))
    return nope, value


def rope_dims(engines: Collection[str]) -> set[int] | None:
    """Return the rotary widths that the engines which a user names take; None: all of them.

    Args:
        engines: names of the engines.
    """
    limited = [engine["head_dims"] for engine in _named(engines) if "head_dims" in engine]
    widths = [{rope for _, rope, _ in dims} for dims in limited]
    return set.intersection(*widths) if widths else None


def needs_factored_queries(num_hidden_layers: int, vocab_size: int, engines: Collection[str]) -> bool:
    """Return whether an engine that the user names reads queries in two factors only, at this depth.

    Args:
        num_hidden_layers: of the model.
        vocab_size: of the model.
        engines: names of the engines.
    """
    factored = any(engine.get("factored_queries") for engine in _named(engines))
    return factored and not has_direct_query_depth(num_hidden_layers, vocab_size)


def stores_powers(config: Mapping[str, Any], engines: Collection[str]) -> bool:
    """Return whether a conversion to MLA stores powers of two, which the quantizers of a named engine need.

    Args:
        config: the config.json that it writes.
        engines: names of the engines.
    """
    (stock_class,) = (config.get("architectures") or [None])[:1]
    helped = [engine for engine in _named(engines) if engine.get("stores_powers")]
    known = any(stock_class in row["names"] for engine in helped for row in engine["classes"])
    return known and not config.get("attention_bias") and has_linear_norm(config)


def _named(engines: Collection[str]) -> Sequence[dict[str, Any]]:
    return [engine for name, engine in _table().items() if name in engines]


def rope_dims_to_try(size: int, rotary_dim: int, num_key_value_heads: int) -> list[int]:
    """Return the values of qk_rope_head_dim to try for a cache row; the rest of the row is kv_lora_rank.

    Args:
        size: elements of the row.
        rotary_dim: of the source; the rotary widths lie between a quarter of it and twice it.
        num_key_value_heads: of the source, whose rotary dimensions together are the upper limit.
    """
    dims = {max(rotary_dim * quarters // 8 * 2, 2) for quarters in (1, 2, 3, 4, 6, 8)}
    limit = min(rotary_dim * num_key_value_heads, size // 2)
    return [dim for dim in sorted(dims) if dim <= limit]
