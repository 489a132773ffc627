"""Convert the layers of a model on one device or on several, and write them in one process.

Layers are independent once their inputs are known. Each further device has a process of its own, because Python
bounds the conversion of a layer. Every process runs the text through the parent by itself and converts the layers
that it takes from one counter, so no hidden states or moments travel between processes.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from headwise.convert.base import Target
from headwise.convert.calibration.calibrate import CalibrationPlan, keep_text, text_folder
from headwise.convert.layers import LayerJob, LayerResult
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint, as_bytes
from headwise.io.writer import Writer
from headwise.models.architecture import Architecture
from headwise.progress import SILENT, Progress


def convert_layers(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    calibration: CalibrationPlan | None,
    writer: Writer,
    devices: Sequence[torch.device],
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """Convert and write every layer.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        calibration: what is measured on the parent; None: nothing.
        writer: of the output folder.
        devices: where layers are converted.
        progress: gets one stage.

    Returns:
        The reports of all converted layers by index, including the layers that an interrupted run had finished.
    """
    todo = [i for i in range(len(target.layouts)) if target.converted_names(i)]
    noted: dict[int, Any] = {i: writer.notes.get(f"layer {i}") for i in todo}
    # A journal that was changed by hand may hold anything: such a layer is converted again.
    done = {i for i in todo if isinstance(noted[i], dict) and set(target.converted_names(i)) <= writer.done}
    reports = {i: report for i, report in noted.items() if i in done}
    remaining = [i for i in todo if i not in done]
    if not remaining:
        return reports
    cache = None
    if calibration is not None and calibration.reuse is None:
        cache = text_folder(checkpoint, calibration, writer)
        if len(devices) > 1:  # before other processes look for the text
            keep_text(checkpoint, target, calibration, devices[0], progress, cache)
    job = LayerJob(checkpoint, arch, target, calibration, cache, writer.allow_nan)
    progress.stage("Converting", total=len(todo), unit="layers")
    progress.advance(len(done))
    for result in spread_layers(job, remaining, devices, progress):
        # The report comes before the tensors, so that an interruption between them does not lose it.
        writer.note(f"layer {result.layer}", result.report)
        for name, tensor in result.tensors.items():
            if name not in writer.done:
                writer.write(name, tensor)
        reports[result.layer] = result.report
        progress.advance(1, layer=result.layer, **_figures(result.report))
        del result  # free its memory before the next layer is read
    return dict(sorted(reports.items()))


def spread_layers(
    job: LayerJob, layers: Sequence[int], devices: Sequence[torch.device], progress: Progress
) -> Iterator[LayerResult]:
    """Convert layers in this process on the first device, and in a process for each further device.

    Args:
        job: what is converted.
        layers: indices, ascending.
        devices: no more of them are used than there are layers.
        progress: receives a note before the text is read.

    Yields:
        The layers, in the order in which they are done.

    Raises:
        HeadwiseError: another process ended without its results, or raised this exception.
    """
    used = devices[: len(layers)]
    if len(used) == 1:
        yield from job.results(layers, used[0], progress)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU cannot use it
    counter = context.Value("l", 0)
    arrived: SimpleQueue[LayerResult | BaseException | None] = SimpleQueue()
    helpers: list[Any] = []
    try:
        for device in used[1:]:
            ours, theirs = context.Pipe(duplex=False)
            given = (theirs, job, list(layers), counter, str(device), torch.get_num_threads())
            helper = context.Process(target=_help, args=given, daemon=True, name=f"headwise on {device}")
            helper.start()
            helpers.append(helper)
            theirs.close()  # the helper's end alone is open: its death ends the connection
            Thread(target=_receive, args=(ours, helper, arrived), daemon=True).start()
        ours_left, working = True, len(helpers)
        own = job.results(_take(layers, counter), used[0], progress)
        while ours_left or working:
            if ours_left and arrived.empty():
                result = next(own, None)
                ours_left = result is not None
            else:
                result = _unwrap(arrived.get())
                working -= result is None
            if result is not None:
                yield result
            del result  # free its memory before the next layer is read
    finally:
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.join()


def device_notes(devices: Sequence[torch.device], used: Sequence[torch.device]) -> Iterator[str]:
    """Yield the lines of the plan about several devices.

    Args:
        devices: as `device` names them.
        used: where layers are converted.
    """
    if len(devices) == 1:
        return
    if len(used) == 1:
        yield f"Layers are converted on {used[0]} alone: without moments the closed form needs no GPU."
    else:
        yield f"Layers are converted on {', '.join(map(str, used))}; all other work is done on {used[0]}."


def _take(layers: Sequence[int], counter: Any) -> Iterator[int]:
    """Yield layers that no other process has taken, each when it is asked for."""
    while True:
        with counter.get_lock():
            place = counter.value
            counter.value += 1
        if place >= len(layers):
            return
        yield layers[place]


def _help(connection: Connection, job: LayerJob, layers: list[int], counter: Any, name: str, threads: int) -> None:
    """Convert layers on a device, and send them: the work of a further process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    torch.set_num_threads(threads)  # the number decides the order of sums
    device = torch.device(name)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for result in job.results(_take(layers, counter), device, SILENT):
            # As arrays: torch would put the tensors into shared memory, which containers limit.
            packed = {n: (t.dtype, t.shape, as_bytes(t).numpy()) for n, t in result.tensors.items()}
            connection.send((result.layer, packed, result.report))
        connection.send(None)
    except BrokenPipeError:
        return  # the first process is dead
    except Exception as error:
        try:
            connection.send((error, traceback.format_exc()))
        except Exception:  # an exception that cannot be pickled
            connection.send((RuntimeError(str(error)), traceback.format_exc()))


def _receive(connection: Connection, helper: Any, arrived: SimpleQueue[Any]) -> None:
    """Pass on what a process sends; its last message is None or an exception."""
    try:
        while (message := connection.recv()) is not None:
            if isinstance(message[0], BaseException):
                error, trace = message
                error.__cause__ = RuntimeError(trace)
                arrived.put(error)
                return
            layer, packed, report = message
            tensors = {n: torch.from_numpy(x).view(dtype).view(shape) for n, (dtype, shape, x) in packed.items()}
            arrived.put(LayerResult(layer, tensors, report))
            del message, packed, tensors
        arrived.put(None)
    except (EOFError, OSError):
        helper.join()
        error = HeadwiseError(
            f"The process of {helper.name.removeprefix('headwise on ')} ended too early, with exit code "
            f"{helper.exitcode}.",
            "It was probably killed for lack of memory; the same command with `resume` goes on.",
        )
        error.keeps_work = True
        arrived.put(error)


def _unwrap(arrived: LayerResult | BaseException | None) -> LayerResult | None:
    if isinstance(arrived, BaseException):
        raise arrived
    return arrived


def _figures(report: dict[str, Any]) -> dict[str, str]:
    """Return the fields of a layer's report for the progress line."""
    refit = report.get("refit")
    if refit:
        before, after = ("NaN" if refit[k] is None else f"{refit[k]:.4f}" for k in ("before", "after"))
        return {"error": f"{before} -> {after}"}
    return {k: f"{v:.4f}" for k, v in report.items() if isinstance(v, float)}
