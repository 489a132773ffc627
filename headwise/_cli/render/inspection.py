"""Print what a model is, and what it can become."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwise._cli import console
from headwise._cli.render.cells import (
    engine_commands,
    format_cache,
    format_count,
    format_heads,
    format_ranges,
    format_saving,
    print_commands,
)
from headwise.format import dtype_name, size, token_count
from headwise.serving.settings import USED_MEMORY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headwise.convert.inspect import Inspection
    from headwise.models.layout import AttentionLayout
    from headwise.serving.planner import ServingForecast

HEAD_COLUMNS = ("attention", ">heads", ">KV heads", ">head dim", "RoPE", "window")
MOST_DAMAGED = 5  # layers that are named where their damage is shown
# The verdicts of engines in a table.
VERDICT_WORDS = {
    "loads": "loads",
    "command": "with a command",
    "wrong": "wrong output",
    "no": "no",
    "refused": "refused",
    "unknown": "not known",
}


FORECAST_COLUMNS = (
    "layout",
    ">cache per token",
    ">cache of a sequence",
    ">weights",
    ">sequences",
    ">decode step, at least",
    ">tokens/s, at most",
)
NO_WEIGHTS = "The weights do not fit into the memory of a GPU: {names}."
NO_SEQUENCE = "The weights fit into the memory of a GPU, and no sequence fits beside them: {names}."
MEMORY_LINE = (
    f"Weights and caches take {USED_MEMORY:.0%} of the memory, vLLM's default{{assumed}}. Activations and CUDA "
    "graphs are not subtracted."
)
STEP_LINE = (
    "A decode step reads weights and cache once, with as many sequences as the table has; real steps take longer."
)
EXPERTS_LINE = (
    "Of the routed experts, a step reads those that its tokens are expected to select, if routing is uniform: "
    "{shares} of them."
)


def render_inspection(inspection: Inspection, *, reasons: bool = False) -> None:
    """Print a model's attention, its cache, and the layouts that it can be converted to.

    Args:
        inspection: the model.
        reasons: print the reason of every verdict of an engine, and the commands; else one word for each.
    """
    about = [inspection.model_type, dtype_name(inspection.dtype)]
    if inspection.parameters:
        about.append(f"{format_count(inspection.parameters)} parameters")
    console.print_line(f"{inspection.model}: {', '.join(about)}", style="bold")
    console.print_line()
    kinds: dict[AttentionLayout, list[int]] = {}
    for layer, layout in enumerate(inspection.layouts):
        kinds.setdefault(layout, []).append(layer)
    parts = {layout.part for layout in kinds}
    console.print_table(
        ("layers", *(["part"] if len(parts) > 1 else []), *HEAD_COLUMNS),
        [
            (
                format_ranges(layers),
                *([layout.part] if len(parts) > 1 else []),
                layout.kind.upper(),
                *format_heads(layout),
                f"{layout.sliding_window:,}" if layout.sliding_window else "",
            )
            for layout, layers in kinds.items()
        ],
    )
    console.print_line()
    contexts = list(inspection.cache.at)
    console.print_table(
        ("possible layout", ">cache per token", *(f">cache at {token_count(c)}" for c in contexts), ">saved"),
        [
            ("unchanged", *format_cache(inspection.cache), ""),
            *((o.name, *format_cache(o.cache), format_saving(o.saved)) for o in inspection.options),
        ],
    )
    _render_serving(inspection, reasons)
    if inspection.damage:
        worst = sorted(range(len(inspection.damage)), key=lambda layer: -inspection.damage[layer])[:MOST_DAMAGED]
        console.print_line()
        console.print_line(
            f"Estimated damage, all layers together: {sum(inspection.damage):.4f} nats per token; most in "
            f"{', '.join(f'layer {layer} ({inspection.damage[layer]:.4f})' for layer in worst)}."
        )
    if inspection.mla:
        console.print_line()
        console.print_line(f"MLA is not possible: {inspection.mla}")
    for rope_range in inspection.rope_ranges:
        console.print_line()
        for line in rope_range.lines():
            console.print_line(line)


def _render_serving(inspection: Inspection, reasons: bool) -> None:
    """Print the forecast for each GPU, and the verdicts of the engines."""
    unchanged = ("unchanged", inspection.serving, inspection.engines)
    layouts = [
        unchanged,
        *((option.name, option.serving, option.engines) for option in inspection.options),
    ]
    if inspection.serving is not None:
        console.print_line()
        console.print_line(f"On each GPU, with sequences of {inspection.serving.context:,} tokens:")
        _print_forecasts([(name, serving) for name, serving, _ in layouts if serving is not None])
        refused: dict[str, list[str]] = {}
        for name, serving, _ in layouts:
            if serving is not None and serving.refusal is not None:
                refused.setdefault(serving.refusal, []).append(name)
        for reason, names in refused.items():
            console.print_line(f"Not served with these options ({', '.join(names)}): {reason}.")
        costs = [serving for _, serving, _ in layouts if serving is not None]
        if any(serving.sequences is not None for serving in costs):
            others = all(verdict.name != "vllm" for verdict in inspection.engines)
            console.print_line(
                MEMORY_LINE.format(assumed=", which is assumed for this engine too" if others else "")
            )
        if any(serving.seconds_per_step is not None for serving in costs):
            console.print_line(STEP_LINE)
        read = [serving.experts_read for serving in costs if serving.experts_read is not None]
        if read:
            ends = dict.fromkeys(f"{share:.0%}" for share in (min(read), max(read)))
            console.print_line(EXPERTS_LINE.format(shares=" to ".join(ends)))
            if inspection.serving.seconds_for_one is not None:
                alone = f"{1e3 * inspection.serving.seconds_for_one:.2f} ms"
                console.print_line(f"With one sequence, a step of the unchanged model takes at least {alone}.")
    verdicts = [(name, verdict) for name, _, found in layouts for verdict in found]
    if verdicts and not reasons:
        console.print_line()
        rows: dict[tuple[str, ...], list[str]] = {}
        for name, _, found in layouts:
            rows.setdefault(tuple(VERDICT_WORDS[verdict.verdict] for verdict in found), []).append(name)
        console.print_table(
            ("layout", *(verdict.name for verdict in inspection.engines)),
            [(", ".join(names), *words) for words, names in rows.items()],
        )
        refusals = [(name, verdict) for name, verdict in verdicts if verdict.verdict == "refused"]
        for engine, reason in dict.fromkeys((verdict.name, verdict.reason) for _, verdict in refusals):
            names = [name for name, verdict in refusals if (verdict.name, verdict.reason) == (engine, reason)]
            if not any(serving and serving.refusal == reason for _, serving, _ in layouts):
                console.print_line(f"Refused by {engine} ({', '.join(names)}): {reason}.")
        console.print_line("--engine NAME shapes MLA for an engine, and prints its reasons and commands.")
    elif verdicts:
        console.print_line()
        lines: dict[str, list[str]] = {}
        for name, verdict in verdicts:
            lines.setdefault(verdict.line, []).append(name)
        console.print_table(("layout", "engine"), [(", ".join(names), line) for line, names in lines.items()])
        served: dict[tuple[str, ...], list[str]] = {}
        for name, _, found in layouts:
            served.setdefault(engine_commands(found), []).append(name)
        for commands, names in served.items():
            print_commands(", ".join(names), commands)
    for note in inspection.notes:
        console.print_line()
        console.print_line(note)


def _print_forecasts(rows: Sequence[tuple[str, ServingForecast]]) -> None:
    """Print the figures of every layout on one GPU, without the columns that are empty, and what does not fit."""
    table = [_forecast_row(*row) for row in rows]
    filled = [place for place in range(len(FORECAST_COLUMNS)) if any(cells[place] for cells in table)]
    console.print_table(
        [FORECAST_COLUMNS[place] for place in filled], [[cells[place] for place in filled] for cells in table]
    )
    short: dict[str, list[str]] = {}
    for name, serving in rows:
        if serving.sequences == 0 and serving.weight_bytes is not None and serving.usable_memory is not None:
            larger = serving.weight_bytes > serving.usable_memory
            short.setdefault(NO_WEIGHTS if larger else NO_SEQUENCE, []).append(name)
    for sentence, names in short.items():
        console.print_line(sentence.format(names="all layouts" if len(names) == len(rows) else ", ".join(names)))


def _forecast_row(name: str, serving: ServingForecast) -> tuple[str, ...]:
    """Return a layout's figures on one GPU; empty where they are not known."""
    per_token, cache = serving.cache_bytes_per_token, serving.cache_bytes
    return (
        name,
        "" if per_token is None else f"{per_token:,.0f} B",
        "" if cache is None else size(round(cache)),
        "" if serving.weight_bytes is None else size(serving.weight_bytes),
        "" if serving.sequences is None else f"{serving.sequences:,}",
        "" if serving.seconds_per_step is None else f"{1e3 * serving.seconds_per_step:.2f} ms",
        "" if serving.tokens_per_second is None else f"{serving.tokens_per_second:,.0f}",
    )
