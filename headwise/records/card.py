"""What a converted folder says about itself: headwise.json for programs, README.md (the model card) for people.

Nothing here depends on the time or the machine, so that a repeated conversion repeats the folder's bytes.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from headwise import __version__
from headwise.convert.plan import Plan
from headwise.environment import versions
from headwise.format import size
from headwise.io.reader import Checkpoint
from headwise.models.layout import CONTEXTS, AttentionLayout, Cache

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")
# What a card may take over from the source's: facts about the model that a conversion does not touch.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
MAX_CARD = 1_000_000
EVALUATION = "Evaluation"  # the section that `headwise card` writes


def make_record(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    out: str,
    hashes: Mapping[str, str],
    files: Mapping[str, str],
    layers: Mapping[int, Mapping[str, Any]],
    device: str,
    verification: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of headwise.json.

    Args:
        out: the name of the output folder, for the command.
        device: the kind that layers were converted on.
        hashes: SHA-256 of every output tensor's bytes.
        files: SHA-256 of every other file but this record and the card.
    """
    return {
        "headwise": __version__,
        "command": command_of(plan, out, verified=verification is not None),
        "arguments": plan.arguments,
        "source": {
            "model": source_name(plan),
            "revision": plan.revision,
            "files": {
                name: {"bytes": state.size, "header_sha256": state.header}
                for name, state in checkpoint.files.items()
            },
        },
        "versions": versions(PACKAGES),
        "device": device,
        "cache": {"before": _cache(plan.cache_before), "after": _cache(plan.cache_after)},
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "bytes": {"before": plan.bytes_before, "after": plan.bytes_after},
        "layers": {str(layer): dict(report) for layer, report in layers.items()},
        "verification": verification,
        "sha256": dict(sorted(hashes.items())),
        "files": dict(sorted(files.items())),
    }


def command_of(plan: Plan, out: str, *, verified: bool = True) -> str:
    """The command that makes the folder again, with what was decided by default spelled out."""
    model = f"{plan.model}@{plan.revision}" if plan.revision else source_name(plan)
    words = ["headwise", "convert", model, out]
    options = {key: value for key, value in plan.arguments.items() if key != "calibration"}
    measured = plan.arguments.get("calibration")
    if measured:
        options["calibrate"] = measured["text"]
        options["calibration_tokens"] = measured["sequences"] * measured["length"]
        options["refit"] = measured["steps"] or "off"
    elif options.get("to") in ("gqa", "mqa", "mla") and not options.get("exact"):
        options["calibrate"] = "none"
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words if verified else [*words, "--no-verify"])


def make_card(plan: Plan, record: Mapping[str, Any], source_card: Path | None = None) -> str:
    """The model card, as text.

    Args:
        record: the content of headwise.json.
        source_card: the source's README.md, whose licence and language are taken over.
    """
    after = plan.layouts_after[0]
    data = ModelCardData(
        base_model=plan.model if plan.revision else None,
        # Of the relations the Hub knows (adapter, merge, quantized, finetune), the one for changed weights.
        base_model_relation="finetune" if plan.revision else None,
        library_name="transformers",
        tags=["headwise", "attention-conversion", after.kind],
        **inherited(source_card),
    )
    title = f"{source_name(plan)} with {_describe(plan.layouts_after)}"
    origin = f"`{source_name(plan)}`" + (f" at commit `{plan.revision}`" if plan.revision else "")
    lines = [
        f"# {title}",
        "",
        f"Converted from {origin} by headwise {record['headwise']}. Stock transformers loads it; there is no",
        "custom code. `headwise.json` holds the record of the conversion.",
        "",
        *_before_and_after(plan),
        "",
        "## Errors",
        "",
        *_errors(plan, record["layers"]),
        "",
        "## Checks",
        "",
        *_checks(record["verification"]),
        "",
        "## Command",
        "",
        "```",
        record["command"],
        "```",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def with_section(card: str, title: str, body: str, *, before: str = "") -> str:
    """A card's text with the section `## title` holding `body`, in place of what stood there.

    Args:
        card: the whole README.md, front matter included.
        body: Markdown without the heading; its own headings are deeper than `##`.
        before: where a new section goes: above the one of this title, or last where there is none.
    """
    lines = card.rstrip("\n").split("\n")
    headings = _headings(lines)
    places = {name: place for place, name in reversed(headings)}
    first = places.get(title, places.get(before, len(lines)))
    after = next((place for place, _ in headings if place > first), len(lines)) if title in places else first
    parts = ["\n".join(lines[:first]).rstrip("\n"), f"## {title}", body.strip("\n"), "\n".join(lines[after:])]
    return "\n\n".join(part for part in parts if part) + "\n"


def without_evaluation(card: str) -> str:
    """A card's text without what was measured of earlier weights: the section and `model-index`."""
    with suppress(Exception):  # front matter that cannot be read holds no figures that the Hub could show
        made = ModelCard(card)
        if made.data.get("eval_results"):
            made.data["eval_results"] = made.data["model_name"] = None
            card = str(made)
    lines = card.split("\n")
    headings = _headings(lines)
    first = next((place for place, title in headings if title == EVALUATION), len(lines))
    after = next((place for place, _ in headings if place > first), len(lines))
    return "\n".join([*lines[:first], *lines[after:]]).rstrip("\n") + "\n"


def _headings(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Line and title of each `## ` heading; what a fence encloses is no heading."""
    found, fence = [], ""
    for place, line in enumerate(lines):
        mark = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            closes = mark and mark[1].startswith(fence) and not mark[2].strip()
            fence = "" if closes else fence
        elif mark:
            fence = mark[1]
        elif line.startswith("## "):
            found.append((place, line[3:].strip()))
    return found


def inherited(source_card: Path | None) -> dict[str, Any]:
    """What the source's card says about licence and language; nothing if it has none or it cannot be read."""
    if source_card is None or not source_card.is_file() or source_card.stat().st_size > MAX_CARD:
        return {}
    try:
        data = ModelCard.load(source_card, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # Front matter is a stranger's YAML; a conversion does not fail over it.
        return {}
    return {key: data[key] for key in INHERITED if data.get(key) and _is_words(data[key])}


def _is_words(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value))


def source_name(plan: Plan) -> str:
    """The repository, or the last part of a local path: the rest of it is nobody's business."""
    return plan.model if plan.revision else Path(plan.model).resolve().name


def _describe(layouts: Sequence[AttentionLayout]) -> str:
    """ "MHA (32 KV heads)", "GQA (8 KV heads)", "MLA (512 + 64)"; the most frequent where layers differ."""
    layout, count = Counter(layouts).most_common(1)[0]
    if layout.kind == "mla":
        inside = f"{layout.kv_lora_rank} + {layout.qk_rope_head_dim}"
    else:
        heads = layout.num_key_value_heads
        inside = f"{heads} KV head{'s' if heads > 1 else ''}"
    rest = (
        "" if len({x.cache_elements_per_token for x in layouts}) == 1 else f" in {count} of {len(layouts)} layers"
    )
    return f"{layout.kind.upper()} ({inside}){rest}"


def _before_and_after(plan: Plan) -> Iterator[str]:
    before, after = plan.cache_before, plan.cache_after
    yield "| | before | after |"
    yield "|---|---|---|"
    yield f"| attention | {_describe(plan.layouts_before)} | {_describe(plan.layouts_after)} |"
    yield f"| KV cache per token | {before.bytes_per_token:,} bytes | {after.bytes_per_token:,} bytes |"
    for tokens in CONTEXTS:
        yield f"| KV cache at {tokens:,} tokens | {size(before.at[tokens])} | {size(after.at[tokens])} |"
    yield f"| parameters | {plan.parameters_before:,} | {plan.parameters_after:,} |"
    yield f"| weights | {size(plan.bytes_before)} | {size(plan.bytes_after)} |"


def _errors(plan: Plan, layers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    found: dict[str, dict[str, float]] = {}
    for layer, report in layers.items():
        for name, value in _numbers(report):
            found.setdefault(name, {})[layer] = value
    if not found:
        smaller = any(
            b.cache_elements_per_token < a.cache_elements_per_token
            for a, b in zip(plan.layouts_before, plan.layouts_after, strict=True)
        )
        yield "Not measured." if smaller else "No layer was approximated."
        return
    yield "Of each layer, relative to what it replaces (0 is exact)."
    yield ""
    yield "| error | median layer | worst layer |"
    yield "|---|---|---|"
    for name, values in found.items():
        worst = max(values, key=lambda layer: values[layer])
        yield f"| {name} | {median(values.values()):.4f} | {values[worst]:.4f} (layer {worst}) |"


def _numbers(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in report.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, float):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _numbers(value, f"{name} ")


def _checks(verification: Mapping[str, Any] | None) -> Iterator[str]:
    if verification is None:
        yield "Not checked: the conversion ran with `--no-verify`."
        return
    yield "Made with the stock classes before the folder was published."
    yield ""
    for check in verification["checks"]:
        yield f"- {check['name']}: {'passed' if check['passed'] else 'FAILED'}. {check['detail']}".rstrip(". ")


def _cache(cache: Cache) -> dict[str, Any]:
    return {"bytes_per_token": cache.bytes_per_token, "at": {str(n): count for n, count in cache.at.items()}}
