"""The layers of a conversion: measured, converted, fitted and written, one in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import Target
from headwise.convert.calibration import calibrate as measure
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.refit.output_projection import solve_output_projection
from headwise.convert.refit.regression import refit as refit_layer
from headwise.format import plain
from headwise.io.reader import Checkpoint
from headwise.io.writer import Writer
from headwise.models.architecture import Architecture
from headwise.progress import Progress


def place(target: Target, calibration: measure.CalibrationPlan | None, device: torch.device) -> torch.device:
    """Where layers are converted: where the parent is measured, or else on a GPU, if they are not merely pooled.

    Closed forms are float64, which other devices than these need not have.
    """
    if calibration is not None or (device.type == "cuda" and target.calibrated and not target.exact):
        return device
    return torch.device("cpu")


def convert_layers(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    calibration: measure.CalibrationPlan | None,
    writer: Writer,
    device: torch.device,
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """Write every converted layer; the reports, also of layers that an interrupted run had finished."""
    todo = [i for i in range(len(target.layouts)) if target.converted_names(i)]
    done = {i for i in todo if f"layer {i}" in writer.notes and set(target.converted_names(i)) <= writer.done}
    reports = {i: writer.notes[f"layer {i}"] for i in done}
    if len(done) == len(todo):
        return reports
    left = [i for i in todo if i not in done]
    records = measure.iter_layer_stats(checkpoint, target, calibration, left, device, progress)
    progress.stage("Converting", total=len(todo), unit="layers")
    progress.advance(len(done))
    for record, layer in records:
        tensors, report = _convert_layer(checkpoint, arch, target, calibration, record, layer, writer, device)
        # Before the tensors: what they were made with must not be lost if the run is cut off between them.
        report = plain(report)  # as JSON holds it, so that a resumed run reads back the same
        writer.note(f"layer {layer}", report)
        for name, tensor in tensors.items():
            if name not in writer.done:
                writer.write(name, tensor)
        reports[layer] = report
        progress.advance(1, layer=layer, **_figures(report))
        del record, tensors  # they would stay while the next layer is read and run
    return dict(sorted(reports.items()))


def _convert_layer(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    calibration: measure.CalibrationPlan | None,
    record: LayerRecord | None,
    layer: int,
    writer: Writer,
    device: torch.device,
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """One layer's new tensors and its report."""
    source = {name: checkpoint.read(name) for name in arch.tensor_names(checkpoint.config, layer)}
    measure.check_finite(checkpoint, target, layer, source, record, writer.allow_nan)
    weights = arch.read_layer(checkpoint.config, layer, source).to_device(device)
    del source
    made, report = target.convert_layer(layer, weights, record)
    made = made.to_device("cpu")  # it is written from there, and the device is for fitting it
    del weights
    if calibration is None or record is None or record.inputs is None:
        return target.export_layer(layer, made, record), report
    record.key_moment = record.value_moment = record.distances = None  # their memory is wanted
    found = target.trainable_layer(layer, made, device, record.inputs.shape[1])
    if found.arguments is not None:
        record.arguments = found.arguments
    better = False
    if calibration.fitted:
        solved = solve_output_projection(
            found.attention, found.projection, record, spare=calibration.steps > 0, device=device
        )
        report["output"], better = asdict(solved), solved.kept
    if calibration.steps:
        outcome = refit_layer(
            found.attention,
            found.parameters,
            record,
            steps=calibration.steps,
            learning_rate=found.learning_rate,
            seed=calibration.seed,
            device=device,
        )
        report["refit"], better = asdict(outcome), better or outcome.kept
    return (found.export(record) if better else target.export_layer(layer, made, record)), report


def _figures(report: dict[str, Any]) -> dict[str, str]:
    """What is worth showing of a layer's report."""
    refit = report.get("refit")
    if refit:
        before, after = ("NaN" if refit[k] is None else f"{refit[k]:.4f}" for k in ("before", "after"))
        return {"error": f"{before} -> {after}"}
    return {k: f"{v:.4f}" for k, v in report.items() if isinstance(v, float)}
