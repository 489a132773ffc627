"""The report of an evaluation: report.html for people, report.md for repositories, report.json for programs.

The page is one file: its figures are in it, and it asks for nothing over the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.eval.report import figures as drawn
from headwise.eval.report import tables
from headwise.eval.result import Evaluation, Subject
from headwise.eval.verdict import judge
from headwise.format import clean, duration, plain

NAMES = ("report.html", "report.md", "report.json")
TEMPLATE = Path(__file__).parent / "report.html"


def write_report(found: Evaluation, folder: str | Path) -> Evaluation:
    """Write the report and its figures into a folder, which is made if it does not exist.

    Returns:
        the evaluation with the names of its figures, as report.json holds it.

    Raises:
        HeadwiseError: the folder holds a report already.
    """
    home = Path(folder).expanduser()
    existing = [name for name in NAMES if (home / name).exists()]
    if existing:
        raise HeadwiseError(f"{home} holds a report already: {existing[0]}.", "Name another folder.")
    home.mkdir(parents=True, exist_ok=True)
    drawings = drawn.drawings(found)
    found = replace(found, figures={**found.figures, **{name: f"{name}.png" for name in drawings}})
    for name, (draw, _) in drawings.items():
        drawn.png(draw, home / f"{name}.png")
    (home / "report.md").write_text(markdown(found), encoding="utf-8")
    (home / "report.html").write_text(page(found), encoding="utf-8")
    # Last: whoever finds it finds all.
    (home / "report.json").write_text(json.dumps(plain(found), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return found


def read_report(path: str | Path) -> Evaluation:
    """The evaluation in a report's folder, or in its report.json.

    Raises:
        HeadwiseError: there is none, or it is not sound.
    """
    file = Path(path).expanduser()
    file = file / "report.json" if file.is_dir() else file
    try:
        return Evaluation.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise HeadwiseError(f"There is no report {file}.", "Name the folder that `headwise eval` wrote.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeadwiseError(f"{file} is not a report of `headwise eval`: {type(error).__name__} {error}.") from None


def page(found: Evaluation) -> str:
    """The report as one HTML page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_readable
    )
    environment.filters |= {"code": _code, "breakable": _breakable}
    made = {
        name: {"svg": drawn.svg(draw, name), "caption": caption}
        for name, (draw, caption) in drawn.drawings(found).items()
    }
    names = ("differences", "positions", "layers", "entropy", "passkey")
    said = found.generation
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title(found),
        subtitle=subtitle(found),
        verdict=judge(found),
        agreement=list(tables.agreement(found)),
        rows=list(tables.figures(found)),
        compared=found.parent is not None,
        gates=found.gates,
        figures={name: made.get(name) for name in names},
        flagged=list(tables.flagged(found)),
        writing=list(tables.writing(found)),
        samples=said.samples if said else (),
        command=found.command,
        facts=list(facts(found)),
        limits=list(limits(found)),
    )


def markdown(found: Evaluation) -> str:
    """The report as Markdown, with its figures as files beside it."""
    captions = {name: caption for name, (_, caption) in drawn.drawings(found).items()}

    def figure(*names: str) -> Iterator[str]:
        for name in names:
            if name in captions:
                yield from (f"![{name}]({name}.png)", "", captions[name], "")

    lines = [f"# {title(found)}", "", subtitle(found), "", f"**{judge(found).text}**", ""]
    lines += _table(("", "", ""), tables.agreement(found), right=(1,))
    if found.comparisons:
        lines += ["", "## What was lost", "", *figure("differences"), *figures_table(found)]
    if found.gates:
        rows = [(gate.name, "holds" if gate.passed else "**fails**", gate.detail) for gate in found.gates]
        lines += ["", "## Gates", "", *_table(("gate", "", ""), rows)]
    where = [*figure("positions", "layers", "entropy"), *(f"{a}: {b}.\n" for a, b in tables.flagged(found))]
    where += figure("passkey")
    if where:
        lines += ["", "## Where it differs", "", *where]
    if found.generation:
        heads = ("greedy continuations", "parent", "child")
        lines += ["", "## What it writes", "", *_table(heads, tables.writing(found), right=(1, 2))]
    lines += ["", "## How it was measured", "", "```", found.command, "```", ""]
    lines += _table(("", ""), facts(found))
    lines += ["", "## What it does not say", "", *(f"- {limit}" for limit in limits(found))]
    return str(_readable("\n".join(lines) + "\n"))


def figures_table(found: Evaluation, *, headlines: bool = False) -> list[str]:
    """The tasks' figures as a Markdown table; only the main ones if `headlines`."""
    rows = [row for row in tables.figures(found) if not (headlines and row.part)]
    rows = [replace(row, figure=f"↳ {row.figure}") if row.part else row for row in rows]
    if found.parent is None:
        return _table(("figure", "", "child"), [(r.figure, r.detail, r.child) for r in rows], right=(2,))
    heads = ("figure", "", "parent", "child", "difference", "95% interval", "flips", "p")
    cells = [
        (row.figure, row.detail, row.parent, row.child, _strong(row), row.interval, row.flips, row.p)
        for row in rows
    ]
    return _table(heads, cells, right=range(2, 8))


def title(found: Evaluation) -> str:
    """ "GQA, 4 KV heads, against MHA, 8 KV heads"."""
    if found.parent is None:
        return _called(found.child)
    return f"{_called(found.child)}, against {_called(found.parent)}"


def subtitle(found: Evaluation) -> str:
    """Which two models."""
    return " against ".join(
        f"{subject.model}@{subject.revision[:12]}" if subject.revision else subject.model
        for subject in _both(found)
    )


def facts(found: Evaluation) -> Iterator[tuple[str, str]]:
    """What one must know to repeat it: label, value."""
    for label, subject in zip(("child", "parent"), _both(found), strict=False):
        yield f"{label}, SHA-256", f"{subject.sha256[:16]}…"
    for key, value in found.settings.items():
        if text := _setting(value):
            yield key.replace("_", " "), text
    yield "time", ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in found.seconds.items())
    yield "versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())


def limits(found: Evaluation) -> Iterator[str]:
    """What the figures cannot carry."""
    if found.parent is None:
        yield "No parent was measured: nothing here tells what the conversion cost."
    if found.settings.get("limit"):
        yield "Tasks were cut to a part of their samples (--limit): their figures are not comparable with others'."
    if found.comparisons:
        yield "It speaks of these tasks and this text; other languages, lengths and domains may fare otherwise."
    if any(one.paired for one in found.comparisons):
        yield "An interval tells how far the choice of samples can move a figure; it knows of no other prompts."
    if found.diagnostics is not None or found.acceptance is not None:
        yield "Agreement with the parent is not quality: a healed child may differ and be as good."
    if found.positions is None or found.parent is None:
        return
    trained = found.positions.trained
    reach = found.positions.child.width * len(found.positions.child.nats)
    if trained and reach < trained:
        yield f"Positions beyond {reach:,} tokens were not measured, of the {trained:,} that the config promises."


def _setting(value: Any) -> str:
    """A setting in words; empty where there is none."""
    if isinstance(value, dict):
        inner = {key.replace("_", " "): _setting(item) for key, item in value.items() if not isinstance(item, list)}
        return ", ".join(
            f"{key} ({text})" if isinstance(value[key.replace(" ", "_")], dict) else f"{key} {text}"
            for key, text in inner.items()
            if text
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _both(found: Evaluation) -> list[Subject]:
    return [found.child, *([found.parent] if found.parent else [])]


def _called(subject: Subject) -> str:
    return subject.attention or subject.model_type


def _readable(value: Any) -> Any:
    """Text as it may stand on a page: control characters spelled out, line breaks kept."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(clean(line.replace("\t", "    ")) for line in value.split("\n"))


def _code(text: str) -> Any:
    """Words between backticks as code, all else as text."""
    from markupsafe import Markup, escape

    code = Markup("<code>{}</code>")
    return Markup("").join(
        code.format(part) if odd % 2 else escape(part) for odd, part in enumerate(clean(text).split("`"))
    )


def _breakable(text: str) -> Any:
    """A name that may be broken behind its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in clean(text).split("_"))


def _strong(row: tables.Row) -> str:
    return f"**{row.difference}**" if row.tone else row.difference


def _table(heads: Sequence[str], rows: Any, right: Sequence[int] = ()) -> list[str]:
    rule = ["---:" if number in right else "---" for number in range(len(heads))]
    lines = [heads, rule, *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    return clean(" ".join(text.split())).replace("|", "\\|")
