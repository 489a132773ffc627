"""Print what was measured: evaluations, decode speed, trainings, the demo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from headwise._cli import console
from headwise._cli.render.cells import detail_layers
from headwise.format import size

if TYPE_CHECKING:
    from headwise.demo.demo import DemoResult
    from headwise.demo.picture import Measurement
    from headwise.eval.bench import BenchResult
    from headwise.eval.report.tables import FigureRow
    from headwise.eval.result import Evaluation
    from headwise.recipes.run import UptrainResult


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
        columns = ("figure", ">parent", ">child", ">change", ">95% interval", ">p (Holm)")
        console.print_table(columns, [cells for row in rows for cells in _figure_cells(row)])
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


def _figure_cells(row: FigureRow) -> Iterator[tuple[str, ...]]:
    """Yield a figure and, in a line of its own so that the table is narrow, what was counted."""
    name = f"↳ {row.figure}" if row.part else row.figure
    yield name, row.parent, row.child, row.difference, row.interval, row.p_holm
    yield f"  {row.detail}" + (f"; flips {row.flips}" if row.flips else ""), "", "", "", "", ""


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
    detail_layers(result.layers)
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
