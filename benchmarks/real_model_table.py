"""Print the tables of docs/results/real-model.md from measured rows, and draw the README's picture.

    python benchmarks/real_model_table.py docs/results/real-model.jsonl [--plot docs/real-model.png]

Each row comes from benchmarks/real_model.py. Rows of one target and method are averaged over their seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from headwise import pictures
from headwise.eval.stats import paired_answers

TEXTS = {"wiki": "WikiText-2", "stories": "stories", "code": "code"}
TASKS = {"hellaswag": "HellaSwag", "piqa": "PIQA", "arc_easy": "ARC-Easy", "lambada": "LAMBADA"}
# Elements of the KV cache per token and layer, of the parent's 384.
CACHE = {"mla:128+64": 192, "mla:64+32": 96, "gqa:1": 128}
NAMES = {"mla:128+64": "MLA 128+64", "mla:64+32": "MLA 64+32", "gqa:1": "MQA (1 KV head)"}
PARENT_CACHE = 384
# By method, refit, distinct tokens of the refit where they are not the default, and the length of its sequences.
LABELS = {
    ("optimal", "joint", 16_000_000, 1024): "16M tokens, one GPU",
    ("optimal", "joint", None, 4096): "defaults, one GPU",
    ("optimal", "joint", None, 1024): "short sequences, one GPU",
    ("optimal", "40", None, None): "refit, two cores",
    ("optimal", "off", None, None): "closed form, two cores",
    ("transmla", "off", None, None): "TransMLA's algorithm",
    ("mean", "off", None, None): "mean of the heads",
}
# Marks of the picture that are close to others: their figures stand below them, or they are left out.
BELOW = {"16M tokens, one GPU", "refit, two cores"}
NOT_DRAWN = {"short sequences, one GPU"}


def label(row: dict[str, Any]) -> str:
    """Return the words for the way a row was converted."""
    return LABELS[row["method"], row["refit"], row.get("refit_tokens"), row.get("refit_length")]


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows by target and label."""
    found = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        found[row["target"], label(row)].append(row)
    order = list(LABELS.values())
    return dict(sorted(found.items(), key=lambda item: (list(CACHE).index(item[0][0]), order.index(item[0][1]))))


def losses(rows: list[dict[str, Any]], parent: dict[str, Any]) -> str:
    """Return the table of losses."""
    lines = [
        "| target | method | KV cache | WikiText-2 | gap | by seed | stories | code | verified | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| parent | | {PARENT_CACHE} elements | {parent['wiki']:.4f} | | | {parent['stories']:.4f} | "
        f"{parent['code']:.4f} | | |",
    ]
    for (target, words), same in groups(rows).items():
        gaps = [row["wiki"] - parent["wiki"] for row in same]
        share = f"{CACHE[target]} (-{100 * (1 - CACHE[target] / PARENT_CACHE):.0f}%)"
        seeds = ", ".join(f"{row['seed']}: {gap:.3f}" for row, gap in zip(same, gaps, strict=True))
        means = [f"{mean(row[name] for row in same):.4f}" for name in TEXTS]
        checks = "yes" if all(row["verified"] for row in same) else "NO"
        seconds = ", ".join("not measured" if row["seconds"] is None else str(row["seconds"]) for row in same)
        lines.append(
            f"| {NAMES[target]} | {words} | {share} | {means[0]} | "
            f"**{mean(gaps):.3f}** | {seeds} | {means[1]} | {means[2]} | {checks} | {seconds} |"
        )
    return "\n".join(lines)


def tasks(rows: list[dict[str, Any]], parent: dict[str, Any]) -> str:
    """Return the table of tasks: accuracy, and the paired difference from the parent with its 95% interval."""
    lines = ["| model | " + " | ".join(TASKS.values()) + " |", "|---|---|---|---|---|"]
    lines.append("| parent | " + " | ".join(f"{parent[name]:.1f}" for name in TASKS) + " |")
    for row in rows:
        if "right" not in row:
            continue
        cells = []
        for name in TASKS:
            child, reference = (torch.tensor([float(c) for c in each["right"][name]]) for each in (row, parent))
            difference = paired_answers(child, reference)
            low, high = difference.interval(0.95)
            cells.append(
                f"{row[name]:.1f} ({100 * difference.estimate:+.1f}; {100 * low:+.1f} to {100 * high:+.1f})"
            )
        lines.append(f"| {NAMES[row['target']]}, {label(row)}, seed {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pictures.in_style
def plot(rows: list[dict[str, Any]], parent: dict[str, Any], file: Path) -> None:
    """Draw the loss above the parent: a line for each target, a mark for each way of converting."""
    figure = pictures.new_figure(3.3, title="SmolLM2-135M-Instruct, converted without any data of the user")
    axes = figure.add_subplot()
    points = defaultdict(list)
    for (target, words), same in groups(rows).items():
        points[words].append((target, mean(row["wiki"] for row in same) - parent["wiki"]))
    targets = sorted(CACHE, key=lambda target: CACHE[target])
    drawn = [words for words in LABELS.values() if words in points and words not in NOT_DRAWN]
    marks = zip(drawn, "osPDv^", pictures.COLOURS, strict=False)
    for words, marker, colour in marks:
        names, gaps = zip(*points[words], strict=True)
        heights = [targets.index(name) for name in names]
        axes.plot(gaps, heights, marker, linestyle="none", color=colour, markersize=6, label=words)
        below = words in BELOW
        for gap, height in zip(gaps, heights, strict=True):
            place = {"xytext": (0, -14 if below else 7), "ha": "center", "color": colour}
            axes.annotate(f"{gap:.2f}", (gap, height), textcoords="offset points", **place)
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.1)
    axes.set_yticks(
        range(len(targets)),
        [f"{NAMES[name]}\n{100 * (CACHE[name] / PARENT_CACHE - 1):+.0f}% KV cache" for name in targets],
    )
    axes.set_ylim(-0.5, len(targets) - 0.5)
    axes.set_xlabel("loss above the parent on WikiText-2 (nats per token, logarithmic)")
    axes.grid(axis="y")
    # Over the names of the targets too, so that three entries fit beside each other.
    pictures.legend_above(axes, columns=3, bbox_to_anchor=(-0.28, 1))
    pictures.save_picture(figure, file)


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    found = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    parent = next(row for row in found if row["target"] == "parent")
    rows = [row for row in found if row["target"] != "parent"]
    print(losses(rows, parent), tasks(rows, parent), sep="\n\n")
    if options.plot:
        plot(rows, parent, options.plot)


if __name__ == "__main__":
    main()
