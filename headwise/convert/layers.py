"""Calibrate, convert, refit and write the layers of a conversion, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import Target
from headwise.convert.calibration.calibrate import check_finite, iter_layer_stats
from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.refit.output_projection import solve_output_projection
from headwise.convert.refit.regression import refit as refit_layer
from headwise.convert.sparse.warm_up import make_indexer
from headwise.format import plain
from headwise.io.reader import Checkpoint, as_bytes
from headwise.io.writer import Writer
from headwise.models.protocol import AttentionModel
from headwise.progress import SILENT, Progress


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


@dataclass(frozen=True)
class LayerJob:
    """What every process that converts layers needs.

    Attributes:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        calibration: what is measured on the parent; None: nothing.
        cache: folder that keeps the calibration text; None: no text is read.
        allow_nan: accept weights that are not finite.
    """

    checkpoint: Checkpoint
    arch: AttentionModel
    target: Target
    calibration: CalibrationPlan | None
    cache: Path | None
    allow_nan: bool

    def results(self, layers: Iterable[int], device: torch.device, progress: Progress) -> Iterator[LayerResult]:
        """Convert layers one by one.

        Args:
            layers: indices, ascending; each is drawn when the layer before it is done.
            device: where layers are converted.
            progress: receives a note before the text is read.
        """
        records = iter_layer_stats(
            self.checkpoint, self.target, self.calibration, layers, device, progress, self.cache
        )
        for record, layer in records:
            result = LayerResult(layer, *self._convert(record, layer, device))
            del record  # free its memory before the next layer is read
            yield result
            del result

    def _convert(
        self, record: LayerRecord | None, layer: int, device: torch.device
    ) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Return one layer's new tensors and its report."""
        checkpoint, arch, target, calibration = self.checkpoint, self.arch, self.target, self.calibration
        names = arch.tensor_names(checkpoint.config, layer)
        read = record.weights if record is not None else {}
        source = {name: read[name] if name in read else checkpoint.read(name).to(device) for name in names}
        check_finite(checkpoint, target, layer, source, record, self.allow_nan)
        weights = arch.read_layer(checkpoint.config, layer, source)  # in float64
        source.clear()
        read.clear()
        converted, report = target.convert_layer(layer, weights, record)
        del weights
        tensors = self._attention(record, layer, device, converted, report)
        indexer = target.layouts[layer].own_indexer
        if indexer is not None and calibration is not None and record is not None:
            more, report["indexer"] = make_indexer(
                target.config,
                indexer,
                layer,
                tensors,
                record,
                steps=calibration.index_steps,
                seed=calibration.seed,
                device=device,
            )
            tensors = {**tensors, **more}
        return tensors, plain(report)

    def _attention(
        self,
        record: LayerRecord | None,
        layer: int,
        device: torch.device,
        converted: Any,
        report: dict[str, Any],
    ) -> Mapping[str, Tensor]:
        """Return the tensors of a converted layer after its refit, and add the refit to its report."""
        target, calibration = self.target, self.calibration
        if calibration is None or record is None or record.inputs is None or not calibration.refits:
            return target.export_layer(layer, converted, record)
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
                seed=calibration.seed,
                device=device,
            )
            report["refit"], better = asdict(outcome), better or outcome.kept
        return module.export(record) if better else target.export_layer(layer, converted, record)


@dataclass(frozen=True)
class LayerResult:
    """A converted layer.

    Attributes:
        layer: its index.
        tensors: its output tensors by name, on the CPU.
        report: its errors and its refit, as JSON holds them, so that a resumed run reads the same values.
    """

    layer: int
    tensors: Mapping[str, Tensor]
    report: dict[str, Any]

    def __getstate__(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Return arrays in place of tensors: torch would put these into shared memory, which containers limit."""
        arrays = {n: (t.dtype, t.shape, as_bytes(t).numpy()) for n, t in self.tensors.items()}
        return self.layer, arrays, self.report

    def __setstate__(self, state: tuple[int, dict[str, Any], dict[str, Any]]) -> None:
        layer, arrays, report = state
        tensors = {n: torch.from_numpy(x).view(dtype).view(shape) for n, (dtype, shape, x) in arrays.items()}
        for name, value in (("layer", layer), ("tensors", tensors), ("report", report)):
            object.__setattr__(self, name, value)


class RemainingLayers:
    """The layers that a conversion has yet to convert, and the reports of those that an interrupted run converted.

    Args:
        target: the decided conversion.
        writer: of the output folder; its journal names the finished layers.

    Attributes:
        indices: of the layers that remain.
    """

    def __init__(self, target: Target, writer: Writer) -> None:
        self._writer = writer
        self._all = [i for i in range(len(target.layouts)) if target.converted_names(i)]
        noted: dict[int, Any] = {i: writer.notes.get(f"layer {i}") for i in self._all}
        written = writer.done
        # A journal that was changed by hand may hold anything: such a layer is converted again.
        self._reports = {
            i: report
            for i, report in noted.items()
            if isinstance(report, dict) and set(target.converted_names(i)) <= written
        }
        self.indices = [i for i in self._all if i not in self._reports]

    def write(
        self,
        results: Iterable[LayerResult],
        progress: Progress = SILENT,
        seconds: float = 0.0,
        *,
        beside: bool = False,
    ) -> dict[int, dict[str, Any]]:
        """Write the remaining layers as they are done.

        Args:
            results: of all layers that remain.
            progress: gets one stage.
            seconds: forecast of the time that all layers take.
            beside: write a layer while the next one is converted. Its tensors are then in memory that much longer.

        Returns:
            The reports of all converted layers by index, including those of an interrupted run.
        """
        reports = dict(self._reports)
        if not self.indices:
            return reports
        progress.stage("Converting", total=len(self._all), unit="layers")
        progress.expect(seconds * len(self.indices) / len(self._all), len(reports))
        with ThreadPoolExecutor(1, "write") as thread:
            written: Future[None] | None = None
            for result in results:
                if written is not None:
                    written.result()
                written = thread.submit(self._write, result)
                if not beside:
                    written.result()
                reports[result.layer] = result.report
                progress.advance(1, layer=result.layer, **_figures(result.report))
                del result  # free its memory before the next layer is read
            if written is not None:
                written.result()
        return dict(sorted(reports.items()))

    def _write(self, result: LayerResult) -> None:
        # The report comes before the tensors, so that an interruption between them does not lose it.
        self._writer.note(f"layer {result.layer}", result.report)
        for name, tensor in result.tensors.items():
            if name not in self._writer.done:
                self._writer.write(name, tensor)


def _figures(report: dict[str, Any]) -> dict[str, str]:
    """Return the fields of a layer's report for the progress line."""
    refit = report.get("refit")
    if refit:
        before, after = ("NaN" if refit[k] is None else f"{refit[k]:.4f}" for k in ("before", "after"))
        return {"error": f"{before} -> {after}"}
    return {k: f"{v:.4f}" for k, v in report.items() if isinstance(v, float)}
