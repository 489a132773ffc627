"""Calibrate, convert, refit and write the layers of a conversion, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import Target
from headwise.convert.calibration.calibrate import CalibrationPlan, check_finite, iter_layer_stats, text_folder
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.refit.output_projection import solve_output_projection
from headwise.convert.refit.regression import refit as refit_layer
from headwise.format import plain
from headwise.io.reader import Checkpoint
from headwise.io.writer import Writer
from headwise.models.architecture import Architecture
from headwise.progress import Progress


def choose_device(target: Target, calibration: CalibrationPlan | None, device: torch.device) -> torch.device:
    """Choose where layers are converted: the device of the calibration, a GPU if moments are used, or the CPU.

    Closed forms need float64, which devices other than CPU and CUDA may not have.

    Args:
        target: the decided conversion.
        calibration: the plan of the calibration; None: there is none.
        device: the requested device.
    """
    if calibration is not None or (device.type == "cuda" and target.calibrated and not target.exact):
        return device
    return torch.device("cpu")


def convert_layers(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    calibration: CalibrationPlan | None,
    writer: Writer,
    device: torch.device,
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """Convert and write every layer.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        calibration: what is measured on the parent; None: nothing.
        writer: of the output folder.
        device: where layers are converted.
        progress: gets one stage.

    Returns:
        The reports of all converted layers by index, including the layers that an interrupted run had finished.
    """
    todo = [i for i in range(len(target.layouts)) if target.converted_names(i)]
    noted: dict[int, Any] = {i: writer.notes.get(f"layer {i}") for i in todo}
    # A journal that was changed by hand may hold anything: such a layer is converted again.
    done = {i for i in todo if isinstance(noted[i], dict) and set(target.converted_names(i)) <= writer.done}
    reports = {i: report for i, report in noted.items() if i in done}
    if len(done) == len(todo):
        return reports
    remaining = [i for i in todo if i not in done]
    cache = None
    if calibration is not None and calibration.reuse is None:
        cache = text_folder(checkpoint, calibration, writer)
    records = iter_layer_stats(checkpoint, target, calibration, remaining, device, progress, cache)
    progress.stage("Converting", total=len(todo), unit="layers")
    progress.advance(len(done))
    for record, layer in records:
        tensors, report = _convert_layer(checkpoint, arch, target, calibration, record, layer, writer, device)
        # The report comes before the tensors, so that an interruption between them does not lose it.
        report = plain(report)  # as in JSON, so that a resumed run reads the same values
        writer.note(f"layer {layer}", report)
        for name, tensor in tensors.items():
            if name not in writer.done:
                writer.write(name, tensor)
        reports[layer] = report
        progress.advance(1, layer=layer, **_figures(report))
        del record, tensors  # free their memory before the next layer is read
    return dict(sorted(reports.items()))


def _convert_layer(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    calibration: CalibrationPlan | None,
    record: LayerRecord | None,
    layer: int,
    writer: Writer,
    device: torch.device,
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return one layer's new tensors and its report."""
    source = {name: checkpoint.read(name) for name in arch.tensor_names(checkpoint.config, layer)}
    check_finite(checkpoint, target, layer, source, record, writer.allow_nan)
    weights = arch.read_layer(checkpoint.config, layer, source).to_device(device)
    del source
    converted, report = target.convert_layer(layer, weights, record)
    converted = converted.to_device("cpu")  # it is written from the CPU; the device is for the refit
    del weights
    if calibration is None or record is None or record.inputs is None:
        return target.export_layer(layer, converted, record), report
    record.key_moment = record.value_moment = record.distances = None  # free their memory
    module = target.trainable_layer(layer, converted, device, record.inputs.shape[1])
    if module.arguments is not None:
        record.arguments = module.arguments
    better = False
    if calibration.fitted:
        solved = solve_output_projection(
            module.attention, module.projection, record, spare=calibration.steps > 0, device=device
        )
        report["output"], better = asdict(solved), solved.kept
    if calibration.steps:
        outcome = refit_layer(
            module.attention,
            module.parameters,
            record,
            steps=calibration.steps,
            learning_rate=module.learning_rate,
            seed=calibration.seed,
            device=device,
        )
        report["refit"], better = asdict(outcome), better or outcome.kept
    return (module.export(record) if better else target.export_layer(layer, converted, record)), report


def _figures(report: dict[str, Any]) -> dict[str, str]:
    """Return the fields of a layer's report for the progress line."""
    refit = report.get("refit")
    if refit:
        before, after = ("NaN" if refit[k] is None else f"{refit[k]:.4f}" for k in ("before", "after"))
        return {"error": f"{before} -> {after}"}
    return {k: f"{v:.4f}" for k, v in report.items() if isinstance(v, float)}
