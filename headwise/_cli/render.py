"""What the results of the verbs look like to a reader. Each function prints one kind of result through `ui`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headwise._cli import console as ui
from headwise.format import dtype_name, layout_names, size

if TYPE_CHECKING:
    from headwise.convert.inspect import Inspection
    from headwise.convert.pipeline import ConvertResult
    from headwise.convert.plan import Plan
    from headwise.convert.verify.check import Verification
    from headwise.demo.demo import Demo, Measurement
    from headwise.eval.bench import Bench
    from headwise.eval.result import Evaluation
    from headwise.models.layout import AttentionLayout, Cache
    from headwise.recipes.run import Uptrained
    from headwise.records.push import Push


def render_inspection(found: Inspection) -> None:
    """A model's attention, its cache, and what it can become."""
    about = [found.model_type, dtype_name(found.dtype)]
    if found.parameters:
        about.append(f"{_count(found.parameters)} parameters")
    ui.say(f"{found.model}: {', '.join(about)}", style="bold")
    ui.say()
    kinds: dict[AttentionLayout, list[int]] = {}
    for layer, layout in enumerate(found.layouts):
        kinds.setdefault(layout, []).append(layer)
    ui.table(
        ("layers", "attention", ">heads", ">KV heads", ">head dim", "RoPE", "window"),
        [
            (
                ranges(layers),
                layout.kind.upper(),
                layout.num_attention_heads,
                layout.num_key_value_heads,
                layout.head_dim,
                rope(layout),
                f"{layout.sliding_window:,}" if layout.sliding_window else "",
            )
            for layout, layers in kinds.items()
        ],
    )
    ui.say()
    contexts = list(found.cache.at)
    ui.table(
        ("can become", ">cache per token", *(f">at {c // 1024}K" for c in contexts), ">saved"),
        [
            ("as it is", *cache(found.cache), ""),
            *((option_name(o), *cache(o.cache), saving(o.saved)) for o in found.options),
        ],
    )
    if found.mla:
        ui.say()
        ui.say(f"Not MLA: {found.mla}")
    for reach in found.reach:
        ui.say()
        for line in reach.lines():
            ui.say(line)


def render_plan(planned: Plan) -> None:
    """What a conversion will do; nothing has been written."""
    copied, rewritten, dropped = (
        sum(action.action == kind for action in planned.actions) for kind in ("copy", "convert", "drop")
    )
    ui.say(f"Plan for {planned.model}", style="bold")
    ui.say()
    ui.table(
        ("", ">before", ">after", ">saved"),
        [
            ("attention", layout_names(planned.layouts_before), layout_names(planned.layouts_after), ""),
            *_cache_rows(planned.cache_before, planned.cache_after),
            ("parameters", f"{planned.parameters_before:,}", f"{planned.parameters_after:,}", ""),
            ("weights", size(planned.bytes_before), size(planned.bytes_after), ""),
        ],
    )
    ui.say()
    tensors: dict[tuple[Any, ...], list[str]] = {}
    for action in planned.actions:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", action.name)
        tensors.setdefault((pattern, action.action, _tensor(action.before), _tensor(action.after)), []).append(action.name)
    ui.table(
        (">tensors", "name", "action", "before", "after"),
        [(len(names), *key) for key, names in tensors.items()],
    )
    ui.say()
    ui.table(
        (),
        [
            ("tensors", f"{copied} copied, {rewritten} rewritten, {dropped} dropped"),
            ("files", f"{len(planned.shards)} of weights, {len(planned.sidecars)} copied beside them"),
            ("disk", size(planned.disk)),
            ("peak memory", size(planned.peak_memory)),
            *(("loads in", engine) for engine in planned.engines),
            *(("left out", name) for name in planned.left_out),
            *(("note", note) for note in planned.notes),
        ],
    )
    for warning in planned.warnings:
        ui.warn(warning)


def render_outcome(done: ConvertResult) -> None:
    """A finished conversion, in a few lines for whoever watched; --verbose adds the layers."""
    planned = done.plan
    before, after = planned.cache_before.bytes_per_token, planned.cache_after.bytes_per_token
    for layer, report in done.layers.items():
        ui.detail(f"layer {layer}: {', '.join(f'{name} {value}' for name, value in _flat(report))}")
    for warning in planned.warnings:
        ui.warn(warning)
    ui.note(f"{layout_names(planned.layouts_before)} -> {layout_names(planned.layouts_after)}")
    if after < before:
        ui.note(f"Cache per token: {size(before)} -> {size(after)}, {saving(1 - after / before)} saved")
    if done.verification:
        ui.note(f"Verified: {len(done.verification.checks)} checks passed.")
    else:
        ui.warn("Not verified.")
    ui.note(f"Wrote {done.out} ({size(planned.disk)}).")
    if done.pushed:
        ui.note(f"Pushed it to {done.pushed.repo}: {done.pushed.url}")


def render_push(pushed: Push) -> None:
    """What went to the Hub, or would go."""
    where = f"{pushed.repo}@{pushed.revision}" if pushed.revision else pushed.repo
    state = "private" if pushed.private else "public"
    amount = size(sum(pushed.files.values()))
    sent = [(name, size(nbytes)) for name, nbytes in pushed.files.items()]
    ui.table(("file", ">size"), sent + [(name, "removed") for name in pushed.deleted])
    ui.say()
    if pushed.commit is None:
        new = "a new" if pushed.creates_repository else "the"
        ui.say(f"{amount} would go to {new} {state} repository {where}. Nothing was sent.")
    elif not pushed.changed:
        ui.say(f"{where} ({state}) holds exactly this already, so nothing was sent: {pushed.url}")
    else:
        ui.say(f"Pushed {amount} to {where} ({state}): {pushed.pull_request or pushed.url}")
    if not pushed.verified:
        ui.warn("The folder is not verified.")


def render_verification(checked: Verification) -> None:
    """Every check with its outcome."""
    ui.table(
        ("check", "", "detail"),
        [(name, "passed" if passed else "FAILED", detail) for name, passed, detail in checked.checks],
    )


def render_bench(measured: Bench) -> None:
    """Parent and child side by side."""
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
        for speed in (*measured.same_batch, *measured.equal_memory)
    ]
    ui.table(("model", ">batch", ">context", ">tokens/s", ">a step", ">prefill", ">cache", ">peak"), rows)
    where = "at the same batch"
    if measured.equal_memory and measured.memory_bytes:
        where = f"within {size(measured.memory_bytes)} each"
    ui.say(f"{measured.speedup:.2f} times the parent's tokens per second, {where}, on {measured.device}.")


def render_evaluation(found: Evaluation) -> None:
    """The verdict, the figures behind it, and where the report is."""
    from headwise.eval import verdict
    from headwise.eval.report import tables

    ui.say(verdict.judge(found).text, style="bold")
    ui.say()
    rows = [row for row in tables.figures(found) if not row.part]
    if rows and found.parent is None:
        ui.table(("figure", "of", ">value"), [(row.figure, row.detail, row.child) for row in rows])
    elif rows:
        ui.table(
            ("figure", "of", ">parent", ">child", ">difference", ">95% interval", ">flips", ">p"),
            [(r.figure, r.detail, r.parent, r.child, r.difference, r.interval, r.flips, r.p) for r in rows],
        )
        ui.say(tables.LEGEND, style="dim")
    if agreed := list(tables.agreement(found)):
        ui.say()
        ui.table((), agreed)
    for label, heads in tables.flagged(found):
        ui.say(f"{label}: {heads}.")
    for gate in found.gates if found.fail_above is not None else ():
        ui.say(f"Gate {gate.name} {'passed' if gate.passed else 'FAILED'}: {gate.detail}")
    for layer in found.diagnostics.layers if found.diagnostics else ():
        ui.detail(f"layer {layer.layer}: hidden {layer.hidden:.4f}, attention {layer.attention:.4f}")


def render_uptrained(healed: Uptrained) -> None:
    """What a training run did to the loss."""
    rows = [("before", healed.before), ("after", healed.after), ("parent", healed.parent)]
    ui.table(
        ("", ">nats per token", ">above the parent"),
        [
            (name, f"{nats:.4f}", "" if healed.parent in (None, nats) else f"{nats - healed.parent:+.4f}")
            for name, nats in rows
            if nats is not None
        ],
    )
    for layer, report in healed.layers.items():
        ui.detail(f"layer {layer}: {', '.join(f'{name} {value}' for name, value in _flat(report))}")
    if healed.tokens:
        ui.note(f"{healed.tokens:,} tokens in {healed.seconds:,.0f} s.")
    ui.note(f"Wrote {healed.out}.")


def render_demo(measured: Demo) -> None:
    """Every model of the demo against the parent."""
    parent = measured.parent
    ui.table(
        ("attention", "method", ">cache per token", ">saved", ">nats per token", ">damage", ">seconds"),
        [_measurement(point, parent) for point in (parent, *measured.measured)],
    )
    ui.say()
    ui.say(f"Measured on {measured.tokens:,} tokens of modules that the model never saw.")
    ui.say(f"Picture: {measured.picture}")


def _measurement(point: Measurement, parent: Measurement) -> tuple[object, ...]:
    own = point is parent
    return (
        point.target,
        point.method,
        f"{point.cache_bytes:,} B",
        "" if own else f"{1 - point.cache_bytes / parent.cache_bytes:.1%}",
        f"{point.nats:.3f}",
        "" if own else f"{point.nats - parent.nats:+.3f}",
        f"{point.seconds:.0f}",
    )


def cache(held: Cache) -> list[str]:
    """Bytes per token and at each context."""
    return [size(held.bytes_per_token), *(size(total) for total in held.at.values())]


def _cache_rows(before: Cache, after: Cache) -> Iterator[tuple[str, str, str, str]]:
    rows = [("cache per token", before.bytes_per_token, after.bytes_per_token)]
    rows += [(f"cache at {context // 1024}K", total, after.at[context]) for context, total in before.at.items()]
    for name, old, new in rows:
        yield name, size(old), size(new), "" if old == new else saving(1 - new / old)


def saving(saved: float) -> str:
    """0.75 -> "75.0%"; a cache that grows, -1.0 -> "2x"."""
    return f"{saved:.1%}" if saved > 0 else f"{1 - saved:.3g}x"


def option_name(option: Any) -> str:
    """ "GQA-8", "MQA", or "MLA 512+64"."""
    if option.kv_lora_rank is not None:
        return f"MLA {option.kv_lora_rank}+{option.qk_rope_head_dim}"
    return f"GQA-{option.num_key_value_heads}" if option.to == "gqa" else option.to.upper()


def rope(layout: AttentionLayout) -> str:
    """How much of a head turns."""
    if layout.rotary_dim == 0:
        return "none"
    return "all" if layout.rotary_dim == layout.head_dim else f"{layout.rotary_dim} of {layout.head_dim}"


def ranges(layers: Sequence[int], longest: int = 36) -> str:
    """Layer numbers as ranges: [0, 1, 2, 5] -> "0-2, 5"; shortened to how many where that gets long."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(text) <= longest else f"{len(layers)} layers: {text[: longest - 12].rsplit(',', 1)[0]}, ..."


def _flat(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in report.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{name}", str(value)


def _count(number: int) -> str:
    for scale, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,}"


def _tensor(kind: Any) -> str:
    return f"{dtype_name(kind[0])} {'x'.join(map(str, kind[1]))}" if kind else ""
