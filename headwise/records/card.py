"""Render the model card (README.md) of a converted folder from its record, for readers and for the Hub.

The card does not depend on the time or the machine: a repeated conversion writes the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from headwise.errors import HeadwiseError, SettingError
from headwise.format import norm_residuals, size
from headwise.io.source import read_json
from headwise.registry import Kind, Method, find_method
from headwise.schema import parse_yaml

# Fields of the source's card that a conversion does not change.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# Bytes of a card and of its front matter, which is YAML and slow to read.
MAX_CARD, MAX_FRONT_MATTER = 1_000_000, 100_000
FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)
MOST_DAMAGED = 5  # layers that the card names
# The first words of common licence files, and the Hub's names of the licences.
LICENCES = {"Apache License Version 2.0": "apache-2.0", "MIT License": "mit", "BSD 3-Clause": "bsd-3-clause"}
TOKENIZER_CONFIG = "tokenizer_config.json"
SPEECH = "AutoModelForSpeechSeq2Seq"
EVALUATION = "Evaluation"  # the section of the measured figures
UPTRAINING = "Uptraining"  # the section of a training run
# The words for the step of a method.
STEPS: Mapping[Kind, str] = {"merge": "merge", "latent": "latent", "grouping": "grouping", "rope": "RoPE rule"}


def render_card(manifest: Mapping[str, Any], source_card: Path | None = None) -> str:
    """Return the text of a model card, made from the records that are present.

    Args:
        manifest: the content of headwise.json. A folder that was trained and not converted has no `attention`.
        source_card: the source's README.md, for its licence and language.
    """
    source, attention = manifest["source"], manifest.get("attention")
    revision, known = source.get("revision"), inherited(source_card)
    if "license" not in known:
        known |= _licence_of(source_card.parent if source_card else None, manifest.get("files") or {})
    if _auto_class(manifest) == "AutoModelForCausalLM":
        known.setdefault("pipeline_tag", "text-generation")
    data = ModelCardData(
        base_model=source["model"] if revision else None,
        # Of the relations the Hub knows (adapter, merge, quantized, finetune), the one for changed weights.
        base_model_relation="finetune" if revision else None,
        library_name="transformers",
        tags=["headwise", "attention-conversion", attention["kind"]] if attention else ["headwise"],
        **known,
    )
    lines = [
        *(_title(manifest) if attention else [f"# {source['model']}, uptrained", ""]),
        *_usage(manifest, chat=_is_chat_model(source_card, manifest.get("files") or {})),
        *_serving(manifest.get("engines") or []),
        *_origin(manifest, known),
        *_quality(manifest),
        *(_conversion(manifest) if attention else []),
        *(line for facts in manifest.get("uptraining") or [] for line in _uptraining(facts)),
        "",
        "## Checks",
        "",
        *_checks(manifest.get("verification")),
    ]
    if attention:
        lines += ["", "## Command", "", "```", manifest["command"], "```"]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _auto_class(manifest: Mapping[str, Any]) -> str:
    """Return the auto class of transformers that loads the model's class; old records name neither."""
    name = str(manifest.get("class") or "ForCausalLM")
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "AutoModelForCausalLM"
    if name.endswith("ForConditionalGeneration"):  # of images, of pairs or of speech
        return str(manifest.get("auto_class") or "AutoModelForImageTextToText")
    return "AutoModel"


def _licence_of(folder: Path | None, files: Collection[str]) -> dict[str, str]:
    """Return the licence that a licence file of the source is, where no card names it.

    Args:
        folder: the source; None: it is unknown.
        files: names of the files beside the weights.
    """
    name = next((name for name in sorted(files) if name.upper().startswith(("LICENSE", "LICENCE"))), None)
    if folder is None or name is None or not (folder / name).is_file():
        return {}
    start = " ".join((folder / name).read_bytes()[:400].decode(errors="replace").split())
    known = next((spdx for words, spdx in LICENCES.items() if words in start), None)
    if known:
        return {"license": known}
    return {"license": "other", "license_name": "see-licence-file", "license_link": name}


def _title(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the title, and the model in two sentences."""
    source = manifest["source"]
    origin = f"`{source['model']}`" + (f" at commit `{source['revision']}`" if source["revision"] else "")
    yield f"# {source['model']} with {manifest['attention']['after']}"
    yield ""
    yield f"Converted from {origin} by headwise {manifest['headwise']}. Stock transformers loads it without custom"
    yield "code. `headwise.json` is the record of the conversion."
    yield ""


def _is_chat_model(source_card: Path | None, files: Collection[str]) -> bool:
    """Return whether the model has a chat template: a file of its own, or an entry of the tokenizer's config.

    Args:
        source_card: beside the tokenizer's config; None: the source is unknown.
        files: names of the files beside the weights.
    """
    if "chat_template.jinja" in files:
        return True
    config = source_card and source_card.with_name(TOKENIZER_CONFIG)
    return bool(config and config.is_file() and read_json(config.parent, TOKENIZER_CONFIG).get("chat_template"))


def _usage(manifest: Mapping[str, Any], chat: bool) -> Iterator[str]:
    """Yield the section with the code that loads the model; OUT stands for the folder or its repository.

    Args:
        manifest: the content of headwise.json.
        chat: whether the prompt is a user's turn in the chat template.
    """
    auto = _auto_class(manifest)
    reader, name = "AutoTokenizer", "tokenizer"
    if auto in ("AutoModelForImageTextToText", SPEECH):
        reader, name = "AutoProcessor", "processor"
    yield "## Usage"
    yield ""
    yield "OUT is the path of this folder, or the name of its repository on the Hub."
    yield ""
    yield "```python"
    yield f"from transformers import {auto}, {reader}"
    yield ""
    yield f'model = {auto}.from_pretrained("OUT", dtype="auto", device_map="auto")'
    yield f'{name} = {reader}.from_pretrained("OUT")'
    if auto == "AutoModelForCausalLM" and chat:
        yield 'messages = [{"role": "user", "content": "What is the capital of France?"}]'
        yield "inputs = tokenizer.apply_chat_template("
        yield '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield ").to(model.device)"
    elif auto != SPEECH:  # it depends on the model whether it reads speech or writes it
        yield f'inputs = {name}(text="Once upon a time", return_tensors="pt").to(model.device)'
    if auto == "AutoModel":
        yield "print(model(**inputs).last_hidden_state.shape)"
    elif auto != SPEECH:
        yield f"print({name}.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
    yield "```"
    yield ""


def _origin(manifest: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section about the base model, its licence and the intended use."""
    source = manifest["source"]
    link = f"[{source['model']}](https://huggingface.co/{source['model']})"
    yield "## Base model, licence and intended use"
    yield ""
    local = f"`{source['model']}`, a local model"
    yield f"- Base model: {link if source.get('revision') else local}."
    if known.get("license"):
        yield f"- Licence: that of the base model, `{known.get('license_name') or known['license']}`."
    else:
        yield "- Licence: that of the base model, which names none in its files."
    yield "- Intended use: that of the base model, where its KV cache is too large. Its limits and risks apply here"
    yield "  too. Lossy conversions can lose facts, long contexts or instructions: evaluate your own use first."
    yield ""


def _quality(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section that `headwise card` replaces by the figures of an evaluation."""
    yield f"## {EVALUATION}"
    yield ""
    if manifest.get("exact") and not manifest.get("uptraining"):
        yield "The conversion is exact: the model computes the function of its base model. No task was measured."
        yield ""
        return
    yield "> [!WARNING]"
    yield "> The quality of this model was not measured on any task. `headwise eval` measures it against its base"
    yield "> model, and `headwise card` writes the figures here."
    yield ""
    loss = manifest.get("text_loss")
    if loss and loss["before"] is not None and loss["after"] is not None and not manifest.get("uptraining"):
        yield f"Loss on {loss['tokens']:,} held-back tokens of {loss['source']}, in nats per token: the base model"
        yield f"{loss['before']:.4f}, this model {loss['after']:.4f} ({loss['after'] - loss['before']:+.4f})."
        yield ""


def _conversion(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the conversion did."""
    yield "## Conversion"
    yield ""
    yield from _method_lines(manifest)
    yield from _before_and_after(manifest)
    yield ""
    yield "## Errors"
    yield ""
    yield from _errors(manifest)
    yield from _recovery(manifest.get("refit") or [])


def _uptraining(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section of one training run."""
    nats, held, settings = facts["nats"], facts["heldout"], facts["settings"]
    teacher = f", learning from `{facts['teacher']}`" if facts["teacher"] else ""
    yield ""
    yield f"## {UPTRAINING}"
    yield ""
    yield f"Trained after the conversion with the recipe `{facts['recipe']}`{teacher}."
    yield ""
    yield f"| | nats per token on {held['tokens']:,} tokens of {held['text']} |"
    yield "|---|---|"
    for name, value in nats.items():
        if value is not None:
            yield f"| {name} | {value:.4f} |"
    yield ""
    if (closed := facts.get("gap_closed")) is not None:
        yield f"- gap to the parent closed: {closed:.1%}"
    if facts["layerwise"]:
        stage = settings["layerwise"]
        yield f"- layer by layer: {stage['steps']} steps of each on {stage['tokens']:,} tokens"
    if facts["tokens"]:
        yield f"- end to end: {facts['tokens']:,} tokens in {facts['steps']:,} steps, {facts['seconds']:,.0f} s"
    yield f"- text: {', '.join(settings['data']['text'])}"
    yield f"- hardware: {facts['hardware']}"
    if facts["command"]:
        yield f"- command: `{facts['command']}`"


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


def _headings(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Return line number and title of each `## ` heading outside fences."""
    headings, fence = [], ""
    for place, line in enumerate(lines):
        mark = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            closes = mark and mark[1].startswith(fence) and not mark[2].strip()
            fence = "" if closes else fence
        elif mark:
            fence = mark[1]
        elif line.startswith("## "):
            headings.append((place, line[3:].strip()))
    return headings


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter of a model card as plain data, and the text below it.

    Args:
        path: the README.md.

    Raises:
        HeadwiseError: the card or its front matter is too large, or the front matter is not plain YAML.
    """
    hint = "Shorten or delete its front matter."
    if path.stat().st_size > MAX_CARD:
        raise HeadwiseError(f"{path} is larger than {MAX_CARD:,} bytes, so it is not a model card.")
    text = path.read_bytes().decode(errors="replace").replace("\r\n", "\n")
    match = FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    if len(match[1]) > MAX_FRONT_MATTER:
        raise HeadwiseError(f"The front matter of {path} is longer than {MAX_FRONT_MATTER:,} characters.", hint)
    try:
        data = parse_yaml(match[1])
    except ValueError as error:
        raise HeadwiseError(f"The front matter of {path} cannot be read: {str(error)[:200]}.", hint) from None
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise HeadwiseError(f"The front matter of {path} is not a mapping of names to values.", hint)
    return data, text[match.end() :]


def inherited(source_card: Path | None) -> dict[str, Any]:
    """Return the licence and language of the source's card; nothing if there is none or it cannot be read.

    Args:
        source_card: the source's README.md.
    """
    if source_card is None or not source_card.is_file():
        return {}
    try:
        data, _ = read_card(source_card)
    except HeadwiseError:  # a conversion does not fail because of the card of its source
        return {}
    return {key: data[key] for key in INHERITED if data.get(key) and _is_words(data[key])}


def _is_words(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value))


def methods_of_record(arguments: Mapping[str, Any], *, shrinks: bool) -> list[Method]:
    """Return the methods of a conversion.

    Args:
        arguments: of headwise.json.
        shrinks: whether a layer caches less than before; otherwise heads are copied, and no method merges them.

    Returns:
        The entries of the registry. A name that the registry does not have is left out.
    """
    names: list[tuple[Kind, Any]] = [("rope", arguments.get("rope"))]
    if arguments.get("to") == "mla":
        names.insert(0, ("latent", arguments.get("method")))
    elif shrinks:
        names.insert(0, ("merge", arguments.get("method")))
        if arguments.get("to") != "mqa":  # with one KV head there is nothing to group
            names.insert(1, ("grouping", arguments.get("grouping")))
    methods = []
    for kind, name in names:
        with suppress(SettingError):
            methods.append(find_method(kind, name))
    return methods


def _method_lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    methods = methods_of_record(manifest["arguments"], shrinks=manifest["attention"]["shrinks"])
    if methods:
        words = [f"{STEPS[m.kind]} `{m.name}` ({'; '.join(filter(None, (m.title, _cite(m))))})" for m in methods]
        yield f"Method: {', '.join(words)}."
        yield ""


def _cite(method: Method) -> str:
    """Return the paper with a link to arXiv, which the Hub turns into a tag."""
    link = r"[arXiv \1](https://arxiv.org/abs/\1)"
    return re.sub(r"arXiv (\d{4}\.\d{5})", link, method.paper or "")


def _before_and_after(manifest: Mapping[str, Any]) -> Iterator[str]:
    cache, parameters, weights = manifest["cache"], manifest["parameters"], manifest["bytes"]
    tokens = {side: cache[side]["bytes_per_token"] for side in ("before", "after")}
    yield "| | before | after |"
    yield "|---|---|---|"
    for part in manifest.get("parts", ()):
        yield f"| {part['part']} attention | {part['before']} | {part['after']} |"
        if part["cached"]:
            sizes = f"{part['bytes_before']:,} bytes | {part['bytes_after']:,} bytes"
            yield f"| {part['part']} KV cache per {part['counts']} | {sizes} |"
    if manifest.get("parts"):
        yield f"| parameters | {parameters['before']:,} | {parameters['after']:,} |"
        yield f"| weights | {size(weights['before'])} | {size(weights['after'])} |"
        return
    yield f"| attention | {manifest['attention']['before']} | {manifest['attention']['after']} |"
    yield f"| KV cache per token | {tokens['before']:,} bytes | {tokens['after']:,} bytes |"
    for context, nbytes in cache["before"]["at"].items():
        after = cache["after"]["at"][context]
        yield f"| KV cache at {int(context):,} tokens | {size(nbytes)} | {size(after)} |"
    yield f"| parameters | {parameters['before']:,} | {parameters['after']:,} |"
    yield f"| weights | {size(weights['before'])} | {size(weights['after'])} |"


def _errors(manifest: Mapping[str, Any]) -> Iterator[str]:
    errors: dict[str, dict[str, float]] = {}
    damage = {layer: report["damage"] for layer, report in manifest["layers"].items() if "damage" in report}
    for layer, report in manifest["layers"].items():
        for name, value in _numbers({key: value for key, value in report.items() if key != "damage"}):
            errors.setdefault(name, {})[layer] = value
    if not errors:
        yield "Not measured." if manifest["attention"]["shrinks"] else "No layer was approximated."
        return
    before = ", before the training below" if manifest.get("uptraining") else ""
    yield f"Relative errors of the converted layers{before} (0 is exact)."
    yield ""
    yield "| error | median layer | worst layer |"
    yield "|---|---|---|"
    for name, values in errors.items():
        worst = max(values, key=lambda layer: values[layer])
        yield f"| {name} | {median(values.values()):.4f} | {values[worst]:.4f} (layer {worst}) |"
    if (residuals := norm_residuals(manifest["layers"])) is not None:
        yield ""
        yield "The base model normalises queries and keys. Linear maps replace these norms: the residuals are"
        yield "their errors, and the scale variances are those of the norms' own scales."
        yield residuals
    if damage:
        first = sorted(damage, key=lambda layer: -damage[layer])[:MOST_DAMAGED]
        yield ""
        yield "Estimated damage of each layer alone, half the Fisher norm of its error in nats per token: in total"
        yield f"{sum(damage.values()):.4f}; most in {', '.join(f'layer {i} ({damage[i]:.4f})' for i in first)}."


def _recovery(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the stages of a joint refit."""
    if not stages:
        return
    yield ""
    yield "Recovered on text sampled from the parent, attention weights only. Held-out loss in nats per token:"
    yield ""
    yield "| stage | steps | tokens | before | after |"
    yield "|---|---|---|---|---|"
    for stage in stages:
        after = "not finite" if stage["after"] is None else f"{stage['after']:.4f}"
        after += "" if stage["kept"] else " (undone)"
        yield f"| {stage['stage']} | {stage['steps']:,} | {stage['tokens']:,} | {stage['before']:.4f} | {after} |"


# What the card writes for each verdict of an engine.
SERVED = {
    "loads": "loads",
    "command": "loads with the commands below",
    "wrong": "**loads, and computes another function**",
    "no": "does not load",
    "unknown": "not known",
}


def _serving(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the section about serving engines, with the commands that serve the folder."""
    if not verdicts:
        return
    yield "## Serving"
    yield ""
    yield "| engine | verdict | reason | evidence |"
    yield "|---|---|---|---|"
    for row in verdicts:
        evidence = f"{row['evidence']}: {row['versions']}" if row["evidence"] else ""
        yield f"| {row['name']} | {SERVED[row['verdict']]} | {row['reason']} | {evidence} |"
    if commands := [command for row in verdicts for command in row["commands"]]:
        yield ""
        yield "```"
        yield from commands
        yield "```"
    yield ""


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
    yield "The folder was reloaded with the stock classes before it was published."
    yield ""
    accepted = verification.get("accepted") or ()
    for check in verification["checks"]:
        failed = f"**FAILED**{', accepted by the user' if check['name'] in accepted else ''}"
        yield f"- {check['name']}: {'passed' if check['passed'] else failed}. {check['detail']}".rstrip(". ")
