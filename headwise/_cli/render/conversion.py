"""Print the plan of a conversion, its result, its verification and its push."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from headwise._cli import console
from headwise._cli.render.cells import (
    detail_layers,
    engine_commands,
    format_saving,
    format_tensor,
    print_commands,
)
from headwise.format import duration, factor, layout_names, norm_residuals, size, token_count

if TYPE_CHECKING:
    from headwise.convert.pipeline import ConvertResult
    from headwise.convert.plan import PartPlan, Plan
    from headwise.convert.verify.verification import Verification
    from headwise.models.layout import CacheSize
    from headwise.records.push import PushResult
    from headwise.serving.tensor_parallel import GpuCache


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
            *(() if plan.parts else map(_gpu_row, plan.gpu_caches)),
            ("parameters", f"{plan.parameters_before:,}", f"{plan.parameters_after:,}", ""),
            ("weights", size(plan.bytes_before), size(plan.bytes_after), ""),
        ],
    )
    console.print_line()
    console.print_table((">tensors", "name and change"), _change_rows(plan))
    console.print_line()
    console.print_table(
        (),
        [
            ("tensors", f"{copied} copied, {converted} converted, {dropped} dropped"),
            ("files", f"{len(plan.shards)} of weights, {len(plan.sidecars)} copied beside them"),
            ("disk", size(plan.disk)),
            ("peak memory", size(plan.peak_memory)),
            *([("time", _format_forecast(plan.seconds))] if plan.seconds else []),
            *(("engine", verdict.line) for verdict in plan.engines),
            *(("not copied", name) for name in plan.left_out),
            *(("note", note) for note in plan.notes),
        ],
    )
    print_commands("the result", engine_commands(plan.engines))
    for warning in plan.warnings:
        console.warn(warning)


def _change_rows(plan: Plan) -> Iterator[tuple[object, ...]]:
    """Yield the tensors that are converted or dropped, by name and shape; copied ones are counted."""
    changes: Counter[tuple[str, str]] = Counter()
    copied = 0
    for action in plan.actions:
        if action.action == "copy":
            copied += 1
            continue
        after = format_tensor(action.after) or "dropped"
        shapes = f"{format_tensor(action.before)} -> {after}" if action.before else f"new, {after}"
        reason = f"; {action.reason}" if action.reason else ""
        changes[re.sub(r"\.\d+(?=\.)", ".*", action.name), f"{shapes}{reason}"] += 1
    for (name, change), count in changes.items():
        yield count, name
        yield "", f"  {change}"
    if copied:
        yield copied, "all others, copied byte for byte" if changes else "copied byte for byte"


def _cache_rows(before: CacheSize, after: CacheSize) -> Iterator[tuple[str, str, str, str]]:
    """Yield the cache per token and at each context: name, before, after, saving."""
    rows = [("cache per token", before.bytes_per_token, after.bytes_per_token)]
    rows += [(f"cache at {token_count(context)}", total, after.at[context]) for context, total in before.at.items()]
    for name, old, new in rows:
        yield name, size(old), size(new), "" if old == new else format_saving(1 - new / old)


def _gpu_row(cache: GpuCache) -> tuple[str, str, str, str]:
    """Return the cache per token on each GPU of tensor parallelism: name, before, after, saving."""
    old, new = cache.before, cache.after
    saved = "" if old is None or new is None or old == new else format_saving(1 - new / old)
    before, after = ("not divisible" if each is None else size(each) for each in (old, new))
    return f"per token on each of {cache.tp} GPUs", before, after, saved


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


def _format_forecast(seconds: Mapping[str, float]) -> str:
    """Return "about 3:05 on this device: calibration 2:10, layers 41 s"."""
    parts = ", ".join(f"{stage} {duration(each)}" for stage, each in seconds.items() if each >= 1)
    return f"about {duration(sum(seconds.values()))} on this device" + (f": {parts}" if parts else "")


def render_conversion(result: ConvertResult) -> None:
    """Print a finished conversion in a few lines; --verbose adds the layers."""
    plan = result.plan
    before, after = plan.cache_before.bytes_per_token, plan.cache_after.bytes_per_token
    detail_layers(result.layers)
    for warning in plan.warnings:
        console.warn(warning)
    for part in plan.parts:
        console.note(part)
    if not plan.parts:
        console.note(f"{layout_names(plan.layouts_before)} -> {layout_names(plan.layouts_after)}")
    if after < before and not plan.parts:
        console.note(f"Cache per token: {size(before)} -> {size(after)}, {format_saving(1 - after / before)} saved")
    if (residuals := norm_residuals(result.layers)) is not None:
        console.note(f"Linear maps replace the norms on queries and keys. {residuals}")
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
    console.note(quality_statement(result))


def quality_statement(result: ConvertResult) -> str:
    """Return what is known of the quality, which the checks of the folder do not cover, and how to measure it."""
    if result.plan.exact:
        return "Quality: the conversion is exact, so the output computes the parent's function."
    before, after = result.plan.layouts_before, result.plan.layouts_after
    changed = [new for old, new in zip(before, after, strict=True) if new != old]
    images = any(layout.part == "vision" for layout in changed)
    images = images or "images" in (result.plan.arguments.get("calibration") or {})
    if changed and not images and not any(layout.on_text for layout in changed):
        return "Quality not measured: text does not run the layers that changed, and eval reads text."
    evaluate = shlex.join(["headwise", "eval", str(result.out), "--baseline", result.plan.model])
    if any(layout.part == "decoder" for layout in after):
        evaluate += " --pairs FILE.jsonl"
    if images:
        evaluate += " --images FILE.jsonl"
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


def render_push(push: PushResult) -> None:
    """Print what was uploaded to the Hub, or, after a dry run, what would be."""
    repository = f"{push.repo}@{push.revision}" if push.revision else push.repo
    state = "private" if push.private else "public"
    amount = size(sum(push.files.values()))
    uploaded = [(name, size(num_bytes)) for name, num_bytes in push.files.items()]
    console.print_table(("file", ">size"), uploaded + [(name, "deleted") for name in push.deleted])
    console.print_line()
    if push.unreachable:
        console.print_line(f"{amount} would go to {repository}. Nothing was sent.")
        console.warn(f"The folder was not compared with the repository. {push.unreachable}")
    elif push.commit is None:
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
