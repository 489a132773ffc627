"""Print the results of the verbs for a reader. Each function prints one kind of result through the console."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headwise._cli import console
from headwise.format import dtype_name, duration, factor, layout_names, size

if TYPE_CHECKING:
    from headwise.convert.inspect import Inspection
    from headwise.convert.pipeline import ConvertResult
    from headwise.convert.plan import PartPlan, Plan
    from headwise.convert.verify.verification import Verification
    from headwise.demo.demo import DemoResult
    from headwise.demo.picture import Measurement
    from headwise.eval.bench import BenchResult
    from headwise.eval.result import Evaluation
    from headwise.models.layout import AttentionLayout, CacheSize
    from headwise.recipes.run import UptrainResult
    from headwise.records.push import PushResult
    from headwise.serving.engines import EngineVerdict
    from headwise.serving.planner import ServingForecast

# Layers that are named where their damage is shown.
HEAD_COLUMNS = ("attention", ">heads", ">KV heads", ">head dim", "RoPE", "window")
MOST_DAMAGED = 5


# The verdicts of engines in a table.
VERDICT_WORDS = {
    "loads": "loads",
    "command": "with a command",
    "wrong": "wrong output",
    "no": "no",
    "unknown": "not known",
}


def render_inspection(inspection: Inspection, *, reasons: bool = False) -> None:
    """Print a model's attention, its cache, and the layouts that it can be converted to.

    Args:
        inspection: the model.
        reasons: print the reason of every verdict of an engine, and the commands; else one word for each.
    """
    about = [inspection.model_type, dtype_name(inspection.dtype)]
    if inspection.parameters:
        about.append(f"{_format_count(inspection.parameters)} parameters")
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
                *_format_heads(layout),
                f"{layout.sliding_window:,}" if layout.sliding_window else "",
            )
            for layout, layers in kinds.items()
        ],
    )
    console.print_line()
    contexts = list(inspection.cache.at)
    console.print_table(
        ("possible layout", ">cache per token", *(f">cache at {c // 1024}K" for c in contexts), ">saved"),
        [
            ("unchanged", *_format_cache(inspection.cache), ""),
            *((o.name, *_format_cache(o.cache), format_saving(o.saved)) for o in inspection.options),
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
        console.print_table(
            (
                "layout",
                ">cache per token",
                ">cache of a sequence",
                ">weights",
                ">sequences",
                ">decode step",
                ">tokens/s",
            ),
            [_forecast_row(name, serving) for name, serving, _ in layouts if serving is not None],
        )
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
        console.print_line("--engine NAME shapes MLA for an engine, and prints its reasons and commands.")
    elif verdicts:
        console.print_line()
        console.print_table(
            ("layout", "engine"),
            [(name if label else "", text) for name, verdict in verdicts for label, text in _engine_rows(verdict)],
        )
    for note in inspection.notes:
        console.print_line()
        console.print_line(note)


def _forecast_row(name: str, serving: ServingForecast) -> tuple[str, ...]:
    """Return a layout's figures on one GPU; empty where they are not known."""
    return (
        name,
        f"{serving.cache_bytes_per_token:,.0f} B",
        size(round(serving.cache_bytes)),
        "" if serving.weight_bytes is None else size(serving.weight_bytes),
        "" if serving.sequences is None else f"{serving.sequences:,}",
        "" if serving.seconds_per_step is None else f"{1e3 * serving.seconds_per_step:.2f} ms",
        "" if serving.tokens_per_second is None else f"{serving.tokens_per_second:,.0f}",
    )


def render_plan(plan: Plan) -> None:
    """Print what a conversion will do."""
    copied, converted, dropped = (
        sum(action.action == kind for action in plan.actions) for kind in ("copy", "convert", "drop")
    )
    console.print_line(f"Plan for {plan.model}", style="bold")
    console.print_line()
    console.print_table(
        ("", ">before", ">after", ">saved"),
        [
            *(row for part in plan.parts for row in _part_rows(part)),
            *(
                []
                if plan.parts
                else [("attention", layout_names(plan.layouts_before), layout_names(plan.layouts_after), "")]
            ),
            *([] if plan.parts else _cache_rows(plan.cache_before, plan.cache_after)),
            ("parameters", f"{plan.parameters_before:,}", f"{plan.parameters_after:,}", ""),
            ("weights", size(plan.bytes_before), size(plan.bytes_after), ""),
        ],
    )
    console.print_line()
    tensors: dict[tuple[Any, ...], list[str]] = {}
    for action in plan.actions:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", action.name)
        shapes = (_format_tensor(action.before), _format_tensor(action.after))
        key = (pattern, action.action, *shapes, action.reason)
        tensors.setdefault(key, []).append(action.name)
    console.print_table(
        (">tensors", "name", "action", "before", "after", "reason"),
        [(len(names), *key) for key, names in tensors.items()],
    )
    console.print_line()
    console.print_table(
        (),
        [
            ("tensors", f"{copied} copied, {converted} converted, {dropped} dropped"),
            ("files", f"{len(plan.shards)} of weights, {len(plan.sidecars)} copied beside them"),
            ("disk", size(plan.disk)),
            ("peak memory", size(plan.peak_memory)),
            *([("time", _format_forecast(plan.seconds))] if plan.seconds else []),
            *(row for verdict in plan.engines for row in _engine_rows(verdict)),
            *(("not copied", name) for name in plan.left_out),
            *(("note", note) for note in plan.notes),
        ],
    )
    for warning in plan.warnings:
        console.warn(warning)


def _engine_rows(verdict: EngineVerdict) -> Iterator[tuple[str, str]]:
    """Yield the verdict of an engine, and the commands that serve the result."""
    yield "engine", verdict.line
    for command in verdict.commands if verdict.verdict == "command" else ():
        yield "", command


def _format_forecast(seconds: Mapping[str, float]) -> str:
    """Return "about 3:05 on this device: calibration 2:10, layers 41 s"."""
    parts = ", ".join(f"{stage} {duration(each)}" for stage, each in seconds.items() if each >= 1)
    return f"about {duration(sum(seconds.values()))} on this device" + (f": {parts}" if parts else "")


def render_conversion(result: ConvertResult) -> None:
    """Print a finished conversion in a few lines; --verbose adds the layers."""
    plan = result.plan
    before, after = plan.cache_before.bytes_per_token, plan.cache_after.bytes_per_token
    _detail_layers(result.layers)
    for warning in plan.warnings:
        console.warn(warning)
    for part in plan.parts:
        console.note(part)
    if not plan.parts:
        console.note(f"{layout_names(plan.layouts_before)} -> {layout_names(plan.layouts_after)}")
    if after < before and not plan.parts:
        console.note(f"Cache per token: {size(before)} -> {size(after)}, {format_saving(1 - after / before)} saved")
    console.note(f"Wrote {result.out} ({size(plan.disk)}).")
    if result.pushed:
        console.note(f"Pushed it to {result.pushed.repo}: {result.pushed.url}")
    if result.verification and result.verification.accepted:
        _warn_accepted(result.verification)
    elif result.verification:
        checks = len(result.verification.checks)
        console.note(f"Verified: the folder is as planned ({checks} checks passed).")
    else:
        console.warn("Not verified.")
    console.note(_quality(result))


def _quality(result: ConvertResult) -> str:
    """Return what is known of the quality, which the checks of the folder do not cover, and how to measure it."""
    if result.plan.exact:
        return "Quality: the conversion is exact, so the output computes the parent's function."
    evaluate = _evaluation(str(result.out), result.plan.model)
    loss = result.text_loss
    if loss is None or loss.before is None or loss.after is None:
        return f"Quality not measured: run {evaluate}"
    change = loss.after - loss.before
    times = math.exp(min(change, 700))
    perplexity = f"perplexity {times - 1:+.1%}" if times < 2 else f"{factor(times)} times the perplexity"
    return (
        f"Quality: the loss on {loss.tokens:,} held-back tokens of {loss.source} is {loss.before:.4f} before and "
        f"{loss.after:.4f} after, {change:+.4f} nats per token ({perplexity}). Tasks not measured: run {evaluate}"
    )


def _evaluation(out: str, parent: str) -> str:
    """Return the commands that evaluate a result; the tasks need the parent as a folder."""
    from headwise.io.source import GGUF

    if parent.endswith(GGUF):
        return f"headwise convert {shlex.quote(parent)} PARENT --dtype bfloat16; {_evaluation(out, 'PARENT')}"
    return shlex.join(["headwise", "eval", out, "--baseline", parent])


def render_push(push: PushResult) -> None:
    """Print what was uploaded to the Hub, or, after a dry run, what would be."""
    repository = f"{push.repo}@{push.revision}" if push.revision else push.repo
    state = "private" if push.private else "public"
    amount = size(sum(push.files.values()))
    uploaded = [(name, size(num_bytes)) for name, num_bytes in push.files.items()]
    console.print_table(("file", ">size"), uploaded + [(name, "deleted") for name in push.deleted])
    console.print_line()
    if push.commit is None:
        article = "a new" if push.creates_repository else "the"
        console.print_line(f"{amount} would go to {article} {state} repository {repository}. Nothing was sent.")
    elif not push.changed:
        console.print_line(f"{repository} ({state}) holds exactly this already, so nothing was sent: {push.url}")
    else:
        console.print_line(f"Pushed {amount} to {repository} ({state}): {push.pull_request or push.url}")
    if push.left:
        console.note(f"{repository} keeps files that the folder does not have: {', '.join(push.left)}.")
    for name in push.accepted:
        console.warn(f"The folder failed the check {name}, and the failure was accepted when it was written.")
    if not push.verified:
        console.warn("The folder is not verified.")


def render_verification(verification: Verification) -> None:
    """Print every check with its outcome."""
    console.print_table(
        ("check", "outcome", "detail"),
        [
            (name, "passed" if passed else "FAILED" + ", accepted" * (name in verification.accepted), detail)
            for name, passed, detail in verification.checks
        ],
    )


def _warn_accepted(verification: Verification) -> None:
    """Name the checks whose failure was accepted."""
    for name, passed, detail in verification.checks:
        if not passed:
            console.warn(f"The check {name} failed, and the failure was accepted: {detail}.")


def render_bench(result: BenchResult) -> None:
    """Print the speed of parent and child."""
    rows = [
        (
            speed.model,
            str(speed.batch),
            f"{speed.context:,}",
            f"{speed.decode_tokens_per_second:,.0f}",
            f"{1e3 * speed.seconds_per_step:.2f} ms",
            f"{1e3 * speed.prefill_seconds:.0f} ms",
            size(speed.cache_bytes),
            size(speed.peak_bytes) if speed.peak_bytes else "",
        )
        for speed in (*result.same_batch, *result.equal_memory)
    ]
    console.print_table(
        ("model", ">batch", ">context", ">tokens/s", ">time per step", ">prefill", ">cache", ">peak memory"), rows
    )
    condition = "at the same batch size"
    if result.equal_memory and result.memory_bytes:
        condition = f"in {size(result.memory_bytes)} each"
    console.print_line(
        f"The child decodes {result.speedup:.2f} times the parent's tokens per second, {condition}, "
        f"on {result.device}."
    )


def render_evaluation(evaluation: Evaluation) -> None:
    """Print the verdict and its figures; --verbose adds the layers."""
    from headwise.eval.report import tables
    from headwise.eval.verdict import verdict_of

    console.print_line(verdict_of(evaluation).text, style="bold")
    console.print_line()
    rows = [row for row in tables.figure_rows(evaluation) if row.main]
    if rows and evaluation.parent is None:
        console.print_table(("figure", "metric", ">value"), [(row.figure, row.detail, row.child) for row in rows])
    elif rows:
        console.print_table(
            ("figure", "metric", ">parent", ">child", ">difference", ">95% interval", ">flips", ">p", ">p (Holm)"),
            [(r.figure, r.detail, r.parent, r.child, r.difference, r.interval, r.flips, r.p, r.p_holm) for r in rows],
        )
        console.print_line(tables.LEGEND, style="dim")
    if agreement := list(tables.agreement_rows(evaluation)):
        console.print_line()
        console.print_table((), agreement)
    for label, heads in tables.flagged_heads(evaluation):
        console.print_line(f"{label}: {heads}.")
    for note in evaluation.notes:
        console.warn(note)
    for gate in evaluation.gates if evaluation.fail_above is not None else ():
        console.print_line(f"Gate {gate.name} {'passed' if gate.passed else 'FAILED'}: {gate.detail}")
    for layer in evaluation.diagnostics.layers if evaluation.diagnostics else ():
        console.detail(f"layer {layer.layer}: hidden {layer.hidden:.4f}, attention {layer.attention:.4f}")


def render_uptraining(result: UptrainResult) -> None:
    """Print the loss before and after a training run; --verbose adds the layers."""
    losses = [("before", result.before), ("after", result.after), ("parent", result.parent)]
    console.print_table(
        ("model", ">nats per token", ">above the parent"),
        [
            (
                name,
                f"{nats:.4f}",
                "" if result.parent is None or nats == result.parent else f"{nats - result.parent:+.4f}",
            )
            for name, nats in losses
            if nats is not None
        ],
    )
    if result.gap_closed is not None:
        console.print_line(f"Gap to the parent closed: {result.gap_closed:.1%}.")
    _detail_layers(result.layers)
    if result.tokens:
        console.note(f"Trained on {result.tokens:,} tokens in {result.seconds:,.0f} s, measurements included.")
    console.note(f"Wrote {result.out}.")


def render_demo(result: DemoResult) -> None:
    """Print every model of the demo beside the parent."""
    parent = result.parent
    console.print_table(
        ("attention", "method", ">cache per token", ">saved", ">nats per token", ">above the parent", ">seconds"),
        [_measurement_row(measurement, parent) for measurement in (parent, *result.measured)],
    )
    console.print_line()
    console.print_line(f"Measured on {result.tokens:,} held-out tokens.")
    console.print_line(f"Picture: {result.picture}")


def _measurement_row(measurement: Measurement, parent: Measurement) -> tuple[object, ...]:
    is_parent = measurement is parent
    return (
        measurement.target,
        measurement.method,
        f"{measurement.cache_bytes:,} B",
        "" if is_parent else f"{1 - measurement.cache_bytes / parent.cache_bytes:.1%}",
        f"{measurement.nats:.3f}",
        "" if is_parent else f"{measurement.nats - parent.nats:+.3f}",
        f"{measurement.seconds:.0f}",
    )


def _detail_layers(layers: Mapping[int, Mapping[str, Any]]) -> None:
    for layer, report in layers.items():
        console.detail(f"layer {layer}: {', '.join(f'{name} {value}' for name, value in _flatten(report))}")


def _format_cache(cache: CacheSize) -> list[str]:
    """Return the size per token and at each context."""
    return [size(cache.bytes_per_token), *(size(total) for total in cache.at.values())]


def _cache_rows(before: CacheSize, after: CacheSize) -> Iterator[tuple[str, str, str, str]]:
    rows = [("cache per token", before.bytes_per_token, after.bytes_per_token)]
    rows += [(f"cache at {context // 1024}K", total, after.at[context]) for context, total in before.at.items()]
    for name, old, new in rows:
        yield name, size(old), size(new), "" if old == new else format_saving(1 - new / old)


def _part_rows(part: PartPlan) -> Iterator[tuple[str, str, str, str]]:
    """Yield the attention of a part, and its cache for one token of the kind that it counts."""
    yield part.part, part.before, part.after, ""
    if part.cached:
        saved = (
            "" if part.bytes_before == part.bytes_after else format_saving(1 - part.bytes_after / part.bytes_before)
        )
        yield f"  cache per {part.counts}", size(part.bytes_before), size(part.bytes_after), saved
    else:
        yield "  cache", "none", "none", ""


def format_saving(saved: float) -> str:
    """Return "75.0%" for 0.75, and "grows 2x" for -1.0, a cache that doubles."""
    return f"{saved:.1%}" if saved > 0 else f"grows {1 - saved:.3g}x" if saved < 0 else "none"


def _format_heads(layout: AttentionLayout) -> tuple[object, ...]:
    """Return the cells of a layer's heads; empty ones for a layer without attention."""
    heads = (layout.num_attention_heads, layout.num_key_value_heads, layout.head_dim, _format_rotary(layout))
    return heads if layout.attends else ("",) * len(heads)


def _format_rotary(layout: AttentionLayout) -> str:
    """Return how many dimensions of a head are rotary."""
    if layout.rotary_dim == 0:
        return "none"
    return "all" if layout.rotary_dim == layout.head_dim else f"{layout.rotary_dim} of {layout.head_dim}"


def format_ranges(layers: Sequence[int], max_length: int = 36) -> str:
    """Return layer numbers as ranges: [0, 1, 2, 5] -> "0-2, 5".

    Args:
        layers: ascending layer numbers.
        max_length: of the text; a longer list is cut and begins with the number of layers.
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    if len(text) <= max_length:
        return text
    return f"{len(layers)} layers: {text[: max_length - 12].rsplit(',', 1)[0]}, ..."


def _flatten(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in report.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{name}", str(value)


def _format_count(number: int) -> str:
    for scale, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,}"


def _format_tensor(tensor: tuple[Any, tuple[int, ...]] | None) -> str:
    return f"{dtype_name(tensor[0])} {'x'.join(map(str, tensor[1]))}" if tensor else ""
