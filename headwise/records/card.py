"""Render the model card (README.md) of a converted folder from its record, for readers and for the Hub.

Nothing depends on the time or the machine, so a repeated conversion repeats the folder's bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from headwise.format import size

# Fields inherited from the source's card: facts about the model that a conversion does not change.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
MAX_CARD = 1_000_000
EVALUATION = "Evaluation"  # the section of the measured figures


def render_card(manifest: Mapping[str, Any], source_card: Path | None = None) -> str:
    """Return the text of a model card.

    Args:
        manifest: the content of headwise.json.
        source_card: the source's README.md, whose licence and language are inherited.
    """
    attention, source = manifest["attention"], manifest["source"]
    revision = source["revision"]
    data = ModelCardData(
        base_model=source["model"] if revision else None,
        # Of the relations the Hub knows (adapter, merge, quantized, finetune), the one for changed weights.
        base_model_relation="finetune" if revision else None,
        library_name="transformers",
        tags=["headwise", "attention-conversion", attention["kind"]],
        **inherited(source_card),
    )
    origin = f"`{source['model']}`" + (f" at commit `{revision}`" if revision else "")
    lines = [
        f"# {source['model']} with {attention['after']}",
        "",
        f"Converted from {origin} by headwise {manifest['headwise']}. Stock transformers loads it; there is no",
        "custom code. `headwise.json` holds the record of the conversion.",
        "",
        *_before_and_after(manifest),
        "",
        "## Errors",
        "",
        *_errors(manifest),
        "",
        "## Checks",
        "",
        *_checks(manifest["verification"]),
        "",
        "## Command",
        "",
        "```",
        manifest["command"],
        "```",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def with_section(card: str, title: str, body: str, *, before: str = "") -> str:
    """Return a card's text with the section `## title` replaced or inserted.

    Args:
        card: the whole README.md, front matter included.
        title: of the section.
        body: Markdown without the heading; its own headings are deeper than `##`.
        before: the title above which a new section is inserted; the end, if no section has it.
    """
    lines = card.rstrip("\n").split("\n")
    headings = _headings(lines)
    places = {name: place for place, name in reversed(headings)}
    first = places.get(title, places.get(before, len(lines)))
    after = next((place for place, _ in headings if place > first), len(lines)) if title in places else first
    parts = ["\n".join(lines[:first]).rstrip("\n"), f"## {title}", body.strip("\n"), "\n".join(lines[after:])]
    return "\n\n".join(part for part in parts if part) + "\n"


def without_evaluation(card: str) -> str:
    """Return a card's text without the figures of earlier weights: the section and `model-index`."""
    with suppress(Exception):  # front matter that cannot be read holds no figures for the Hub
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
    """Return line and title of each `## ` heading outside fences."""
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
    """Return the licence and language of the source's card; nothing if there is none or it cannot be read."""
    if source_card is None or not source_card.is_file() or source_card.stat().st_size > MAX_CARD:
        return {}
    try:
        data = ModelCard.load(source_card, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # The front matter may be any YAML; a conversion does not fail because of it.
        return {}
    return {key: data[key] for key in INHERITED if data.get(key) and _is_words(data[key])}


def _is_words(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value))


def _before_and_after(manifest: Mapping[str, Any]) -> Iterator[str]:
    cache, parameters, weights = manifest["cache"], manifest["parameters"], manifest["bytes"]
    tokens = {side: cache[side]["bytes_per_token"] for side in ("before", "after")}
    yield "| | before | after |"
    yield "|---|---|---|"
    yield f"| attention | {manifest['attention']['before']} | {manifest['attention']['after']} |"
    yield f"| KV cache per token | {tokens['before']:,} bytes | {tokens['after']:,} bytes |"
    for context, nbytes in cache["before"]["at"].items():
        after = cache["after"]["at"][context]
        yield f"| KV cache at {int(context):,} tokens | {size(nbytes)} | {size(after)} |"
    yield f"| parameters | {parameters['before']:,} | {parameters['after']:,} |"
    yield f"| weights | {size(weights['before'])} | {size(weights['after'])} |"


def _errors(manifest: Mapping[str, Any]) -> Iterator[str]:
    errors: dict[str, dict[str, float]] = {}
    for layer, report in manifest["layers"].items():
        for name, value in _numbers(report):
            errors.setdefault(name, {})[layer] = value
    if not errors:
        yield "Not measured." if manifest["attention"]["shrinks"] else "No layer was approximated."
        return
    yield "Of each layer, relative to what it replaces (0 is exact)."
    yield ""
    yield "| error | median layer | worst layer |"
    yield "|---|---|---|"
    for name, values in errors.items():
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
