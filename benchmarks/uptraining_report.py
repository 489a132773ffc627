"""Write the tables and pictures of benchmarks/uptraining.py, or write them again from a results file.

python benchmarks/uptraining_report.py OUT/results.jsonl OUT
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from headwise import pictures
from headwise.pictures import BASELINE, INK

BLUE, ORANGE = pictures.COLOURS[:2]
# A colour for each start, a dash for each recipe; distinct for readers with red-green colour blindness.
COLOURS = {"mean": BASELINE, "transmla": BASELINE, "aligned": ORANGE, "optimal": BLUE}
DASHES = {"paper": (0, (1, 1.5)), "distill": (0, (5, 2)), "two-stage": "-"}
MARKERS = {"paper": "s", "distill": "^", "two-stage": "o"}
# The recipe of a reference row: the same layout, pretrained from random weights on all tokens.
PRETRAINED = "pretrain-demo"

Row = dict[str, Any]


def write(home: Path, rows: Sequence[Row], parent: float, headlines: dict[tuple[str, float], float]) -> None:
    """Write OUT/results.csv with all rows; OUT/table.md, gap.png and stages.png without the rows of a sweep."""
    every = [row | {"gap": row["nats"] - parent} for row in rows if row["recipe"] != "parent"]
    names = ("text", "target", "method", "recipe", "percent", "seed", "tokens", "nats", "gap", "train_seconds")
    with (home / "results.csv").open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow((*names, "settings", "swept"))
        for row in every:
            figures = [f"{v:.4f}" if isinstance(v := row.get(name, ""), float) else v for name in names]
            out.writerow([*figures, " ".join(f"{k}={v}" for k, v in row["settings"].items()), int(row["swept"])])
    gaps = [row for row in every if not row["swept"]]
    text = "\n".join([*_headlines(gaps, headlines), "", *_table(gaps)])
    (home / "table.md").write_text(f"Parent {parent:.4f}\n\n{text}\n")
    draw(gaps, home / "gap.png")
    draw_stages(gaps, headlines, home / "stages.png")


def _headlines(rows: Sequence[Row], wanted: dict[tuple[str, float], float]) -> Iterator[str]:
    yield "| target | tokens | gap, three seeds | mean ± sd | target gap |"
    yield "|---|---|---|---|---|"
    for (target, percent), least in wanted.items():
        gaps = sorted(r["gap"] for r in _of(rows, target, "optimal", "two-stage") if r["percent"] == percent)
        if gaps:
            each = ", ".join(f"{gap:+.4f}" for gap in gaps)
            spread = f"{mean(gaps):+.4f}" + (f" ± {stdev(gaps):.4f}" if len(gaps) > 1 else "")
            yield f"| {target} | {percent:g}% | {each} | {spread} | {least} |"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    budgets = sorted({row["percent"] for row in rows if row["recipe"] in DASHES})
    yield f"| target | start | recipe | before | {' | '.join(f'{budget:g}%' for budget in budgets)} |"
    yield "|---|---|---|---|" + "---|" * len(budgets)
    for target, method, recipe in _kinds(rows):
        found = _of(rows, target, method, recipe)
        begun = _of(rows, target, method, "layerwise" if recipe == "two-stage" else "convert")
        cells = []
        for budget in budgets:
            gaps = [row["gap"] for row in found if row["percent"] == budget]
            cells.append(f"{mean(gaps):+.3f}" if gaps else "")
        before = f"{begun[0]['gap']:.3f}" if begun else ""
        yield f"| {target} | {method} | {recipe} | {before} | {' | '.join(cells)} |"


@pictures.in_style
def draw_stages(rows: Sequence[Row], wanted: dict[tuple[str, float], float], path: Path) -> None:
    """Draw the gap of each target after the conversion, the layer-by-layer stage and the end-to-end stage."""
    figure = pictures.new_figure(3.5, title="Gap after each stage; short lines are the target gaps")
    axes = figure.add_subplot()
    labels = []
    for place, ((target, percent), least) in enumerate(wanted.items()):
        ended = [r["gap"] for r in _of(rows, target, "optimal", "two-stage") if r["percent"] == percent]
        stages = [[r["gap"] for r in _of(rows, target, "optimal", s)][:1] for s in ("convert", "layerwise")] + [
            ended
        ]
        styles = ((BASELINE, "converted"), (ORANGE, "layer by layer"), (BLUE, "end to end"))
        for shift, (gaps, (colour, label)) in enumerate(zip(stages, styles, strict=True)):
            if gaps:
                x = place + 0.22 * (shift - 1)
                axes.plot(
                    [x] * len(gaps), gaps, "o", color=colour, markersize=4.5, label=label if not place else None
                )
                axes.annotate(
                    f"{mean(gaps):.3f}", (x, max(gaps)), xytext=(0, 6), textcoords="offset points", ha="center",
                    color=colour, fontsize=8, bbox={"facecolor": pictures.PAPER, "edgecolor": "none", "pad": 0.5},
                )  # fmt: skip
        axes.plot([place - 0.35, place + 0.35], [least] * 2, color=INK, linewidth=1)
        labels.append(f"{target}\n{percent:g}%")
    axes.set_yscale("log")
    axes.set_yticks([0.01, 0.05, 0.1, 0.5, 1], ["0.01", "0.05", "0.1", "0.5", "1"])
    axes.set_yticks([], minor=True)
    axes.set_ylim(0.007, 4)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("target, and tokens in percent of the pretraining")
    axes.set_ylabel("nats above the parent (held-out modules)")
    axes.grid(axis="y")
    pictures.legend_above(axes)
    pictures.save_picture(figure, path)


@pictures.in_style
def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel for each target: gap against tokens, with one line for each start and recipe."""
    targets = list(dict.fromkeys(target for target, _, _ in _kinds(rows)))
    wide, high = min(3, len(targets)), -(-len(targets) // 3)
    figure = pictures.new_figure(2.5 * high, width=2.75 * wide)
    shown: dict[str, Any] = {}
    for place, target in enumerate(targets):
        axes = figure.add_subplot(high, wide, place + 1)
        for kind, method, recipe in _kinds(rows):
            if kind != target:
                continue
            found = _of(rows, target, method, recipe)
            xs = sorted({row["percent"] for row in found})
            ys = [mean(row["gap"] for row in found if row["percent"] == x) for x in xs]
            style = {"color": COLOURS[method], "linestyle": DASHES[recipe], "marker": MARKERS[recipe]}
            shown[f"{method}, {recipe}"] = axes.plot(xs, ys, linewidth=1.3, markersize=4, **style)[0]
        for row in rows:
            if (row["target"], row["recipe"]) == (target, PRETRAINED):
                label = "this layout, pretrained on 100%"
                shown[label] = axes.axhline(row["gap"], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(0.21, 6)
        axes.set_ylim(0.01, 1)
        axes.set_xticks([0.25, 0.5, 1, 2, 5], ["0.25", "0.5", "1", "2", "5"])
        axes.set_xticks([], minor=True)
        axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"])
        axes.set_yticks([], minor=True)
        axes.set_title(target, fontweight="bold")
        axes.grid()
    names = sorted(shown, key=lambda name: next((i for i, m in enumerate(COLOURS) if name.startswith(m)), -1))
    legend = {"handles": [shown[name] for name in names], "labels": names}
    if len(targets) < high * wide:  # the last place is free
        free = figure.add_subplot(high, wide, high * wide)
        free.set_axis_off()
        free.legend(loc="center", **legend)
    else:
        figure.legend(loc="outside right center", **legend)
    figure.supxlabel("tokens, in percent of the pretraining", fontsize=9)
    figure.supylabel("nats above the parent (held-out modules)", fontsize=9)
    pictures.save_picture(figure, path)


def _kinds(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    methods, recipes = list(COLOURS), list(DASHES)
    found = {(row["target"], row["method"], row["recipe"]) for row in rows if row["recipe"] in recipes}
    return sorted(
        found, key=lambda kind: ("MLA" in kind[0], kind[0], methods.index(kind[1]), recipes.index(kind[2]))
    )


def _of(rows: Sequence[Row], target: str, method: str, recipe: str) -> list[Row]:
    return [row for row in rows if (row["target"], row["method"], row["recipe"]) == (target, method, recipe)]


def main() -> None:
    from uptraining import HEADLINES

    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    parent = next(row["nats"] for row in rows if row["recipe"] == "parent")
    write(Path(sys.argv[2]), rows, parent, HEADLINES)


if __name__ == "__main__":
    main()
