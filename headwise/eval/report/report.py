"""Write the report of an evaluation: report.html for readers, report.md for repositories, report.json for programs.

The page is one file: it contains its figures and loads nothing over the network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.eval.report import tables
from headwise.eval.report.figures import make_drawings, render_svg, write_figure
from headwise.eval.report.publish import REPORT
from headwise.eval.result import Evaluation, Subject
from headwise.eval.verdict import verdict_of
from headwise.format import clean, duration, plain
from headwise.io.source import read_json
from headwise.io.workdir import write_file_atomically

NAMES = ("report.html", "report.md", REPORT)
TEMPLATE = Path(__file__).parent / "report.html"


def write_report(evaluation: Evaluation, folder: str | Path) -> Evaluation:
    """Write the report and its figures into a folder, which is made if it does not exist.

    Args:
        evaluation: the whole result.
        folder: the report's folder.

    Returns:
        The evaluation with the names of its figures, as report.json holds it.

    Raises:
        HeadwiseError: the folder holds a report already.
    """
    home = Path(folder).expanduser()
    existing = [name for name in NAMES if (home / name).exists()]
    if existing:
        raise HeadwiseError(f"{home} holds a report already: {existing[0]}.", "Name another folder.")
    home.mkdir(parents=True, exist_ok=True)
    drawings = make_drawings(evaluation)
    evaluation = replace(evaluation, figures={**evaluation.figures, **{name: f"{name}.png" for name in drawings}})
    for name, (draw, _) in drawings.items():
        write_figure(draw, home / f"{name}.png")
    write_file_atomically(home / "report.md", render_markdown(evaluation).encode())
    write_file_atomically(home / "report.html", render_page(evaluation).encode())
    # The last file, so that a folder with report.json is complete.
    text = json.dumps(plain(evaluation), indent=2, allow_nan=False) + "\n"
    write_file_atomically(home / REPORT, text.encode())
    return evaluation


def read_report(path: str | Path) -> Evaluation:
    """Read the evaluation of a report.

    Args:
        path: the report's folder, or its report.json.

    Returns:
        The evaluation.

    Raises:
        HeadwiseError: there is no report, or it cannot be read.
    """
    file = Path(path).expanduser()
    file = file / REPORT if file.is_dir() else file
    try:
        if not os.path.lexists(file):
            raise HeadwiseError(f"There is no report {file}.", "Name the folder that `headwise eval` wrote.")
        return Evaluation.from_dict(read_json(file.parent, file.name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, TypeError) else f"{type(error).__name__} {error}"
        raise HeadwiseError(f"{file} is not a report of `headwise eval`: {reason}.") from None


def render_page(evaluation: Evaluation) -> str:
    """Render the report as one HTML page.

    Args:
        evaluation: the whole result.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_readable
    )
    environment.filters |= {"code": _code, "breakable": _breakable}
    drawings = {
        name: {"svg": render_svg(draw, name), "caption": caption}
        for name, (draw, caption) in make_drawings(evaluation).items()
    }
    names = ("differences", "positions", "layers", "entropy", "passkey")
    generation = evaluation.generation
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_title(evaluation),
        subtitle=_subtitle(evaluation),
        verdict=verdict_of(evaluation),
        agreement=list(tables.agreement_rows(evaluation)),
        rows=list(tables.figure_rows(evaluation)),
        compared=evaluation.parent is not None,
        gates=evaluation.gates,
        figures={name: drawings.get(name) for name in names},
        flagged=list(tables.flagged_heads(evaluation)),
        generation=list(tables.generation_rows(evaluation)),
        samples=generation.samples if generation else (),
        command=evaluation.command,
        facts=list(_facts(evaluation)),
        limits=list(limits(evaluation)),
    )


def render_markdown(evaluation: Evaluation) -> str:
    """Render the report as Markdown, with its figures as files beside it.

    Args:
        evaluation: the whole result.
    """
    captions = {name: caption for name, (_, caption) in make_drawings(evaluation).items()}

    def figures(*names: str) -> Iterator[str]:
        for name in names:
            if name in captions:
                yield from (f"![{name}]({name}.png)", "", captions[name], "")

    lines = [f"# {_title(evaluation)}", "", _subtitle(evaluation), "", f"**{verdict_of(evaluation).text}**", ""]
    lines += _table(("", "", ""), tables.agreement_rows(evaluation), right=(1,))
    if evaluation.comparisons:
        lines += ["", "## Quality loss", "", *figures("differences"), *figures_table(evaluation)]
    if evaluation.gates:
        rows = [(gate.name, "holds" if gate.passed else "**fails**", gate.detail) for gate in evaluation.gates]
        lines += ["", "## Gates", "", *_table(("gate", "", ""), rows)]
    places = [*figures("positions", "layers", "entropy")]
    places += [f"{label}: {heads}.\n" for label, heads in tables.flagged_heads(evaluation)]
    places += figures("passkey")
    if places:
        lines += ["", "## Where child and parent differ", "", *places]
    if evaluation.generation:
        heads = ("greedy continuations", "parent", "child")
        lines += ["", "## Generated text", "", *_table(heads, tables.generation_rows(evaluation), right=(1, 2))]
    lines += ["", "## Method", "", "```", evaluation.command, "```", ""]
    lines += _table(("", ""), _facts(evaluation))
    lines += ["", "## Limits", "", *(f"- {limit}" for limit in limits(evaluation))]
    return str(_readable("\n".join(lines) + "\n"))


def figures_table(evaluation: Evaluation, *, headlines: bool = False) -> list[str]:
    """Render the figures of the tasks as a Markdown table.

    Args:
        evaluation: the whole result.
        headlines: whether only headlines, perplexities and significant differences are in it.

    Returns:
        The lines.
    """
    rows = [row for row in tables.figure_rows(evaluation) if row.main or not headlines]
    rows = [replace(row, figure=f"↳ {row.figure}") if row.part else row for row in rows]
    if evaluation.parent is None:
        return _table(("figure", "", "child"), [(r.figure, r.detail, r.child) for r in rows], right=(2,))
    heads = ("figure", "", "parent", "child", "difference", "95% interval", "flips", "p", "p (Holm)")
    cells = [
        (r.figure, r.detail, r.parent, r.child, _emphasized(r), r.interval, r.flips, r.p, r.p_holm) for r in rows
    ]
    return _table(heads, cells, right=range(2, 9))


def limits(evaluation: Evaluation) -> Iterator[str]:
    """Yield sentences on what the figures do not show.

    Args:
        evaluation: the whole result.
    """
    if evaluation.parent is None:
        yield "No parent was measured, so the figures do not show the loss of the conversion."
    yield from evaluation.notes
    if evaluation.settings.get("limit"):
        yield "The tasks used a part of their samples (`limit`): do not compare these figures with published ones."
    if evaluation.comparisons:
        yield "The figures are of these tasks and this text; other languages, lengths and domains can differ."
    if any(comparison.paired for comparison in evaluation.comparisons):
        yield "An interval covers the choice of samples, not the choice of prompts."
    if evaluation.diagnostics is not None or evaluation.acceptance is not None:
        yield (
            "Agreement with the parent is not quality: after recovery fine-tuning a child can differ from its "
            "parent and be as good."
        )
    if evaluation.positions is None or evaluation.parent is None:
        return
    trained, measured = evaluation.positions.trained, evaluation.positions.child.length
    if trained and measured < trained:
        yield f"Positions beyond {measured:,} tokens were not measured; the context of the config is {trained:,}."


def _title(evaluation: Evaluation) -> str:
    """Return "GQA, 4 KV heads, against MHA, 8 KV heads"."""
    if evaluation.parent is None:
        return _layout(evaluation.child)
    return f"{_layout(evaluation.child)}, against {_layout(evaluation.parent)}"


def _subtitle(evaluation: Evaluation) -> str:
    """Return the names of the models."""
    return " against ".join(
        f"{subject.model}@{subject.revision[:12]}" if subject.revision else subject.model
        for subject in _subjects(evaluation)
    )


def _facts(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Yield what is needed to repeat the evaluation: label, value."""
    for label, subject in zip(("child", "parent"), _subjects(evaluation), strict=False):
        yield f"{label}, SHA-256", f"{subject.sha256[:16]}…"
    for key, value in evaluation.settings.items():
        if text := _setting(value):
            yield key.replace("_", " "), text
    yield "time", ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in evaluation.seconds.items())
    yield "versions", ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())


def _setting(value: Any) -> str:
    """Return a setting in words; empty for a value that is not set."""
    if isinstance(value, dict):
        words = []
        for key, item in value.items():
            text = "" if isinstance(item, list) else _setting(item)
            if text:
                label = key.replace("_", " ")
                words.append(f"{label} ({text})" if isinstance(item, dict) else f"{label} {text}")
        return ", ".join(words)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _subjects(evaluation: Evaluation) -> list[Subject]:
    return [evaluation.child, *([evaluation.parent] if evaluation.parent else [])]


def _layout(subject: Subject) -> str:
    return subject.attention or subject.model_type


def _readable(value: Any) -> Any:
    """Return text with its control characters escaped and its line breaks kept."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(clean(line.replace("\t", "    ")) for line in value.split("\n"))


def _code(text: str) -> Any:
    """Return text with the words in backquotes as HTML code."""
    from markupsafe import Markup, escape

    code = Markup("<code>{}</code>")
    return Markup("").join(
        code.format(part) if odd % 2 else escape(part) for odd, part in enumerate(clean(text).split("`"))
    )


def _breakable(text: str) -> Any:
    """Return a name with a possible line break behind each underscore."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in clean(text).split("_"))


def _emphasized(row: tables.FigureRow) -> str:
    return f"**{row.difference}**" if row.tone else row.difference


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    rule = ["---:" if number in right else "---" for number in range(len(heads))]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in (heads, rule, *rows)]


def _cell(text: str) -> str:
    return clean(" ".join(text.split())).replace("|", "\\|")
