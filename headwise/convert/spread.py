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
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from headwise.convert.calibration.calibrate import keep_text
from headwise.convert.layers import LayerJob, LayerResult
from headwise.errors import HeadwiseError
from headwise.io.reader import as_bytes
from headwise.io.writer import Writer
from headwise.progress import SILENT, Progress


class LayerSpread:
    """The layers that a conversion has yet to convert, and the processes of its further devices.

    Use it as a context manager. Entering starts the processes, which import and wait. Meanwhile the first process
    may sample text and measure the parent.

    Args:
        job: what is converted.
        writer: of the output folder; its journal names the layers that an interrupted run had finished.
        devices: where layers are converted, the first of them by this process. No more of them are used than there
            are layers.
        progress: gets one stage.
        seconds: forecast of the time that all layers take.
    """

    def __init__(
        self,
        job: LayerJob,
        writer: Writer,
        devices: Sequence[torch.device],
        progress: Progress = SILENT,
        seconds: float = 0.0,
    ) -> None:
        self._job, self._writer, self._progress, self._seconds = job, writer, progress, seconds
        target = job.target
        self._todo = [i for i in range(len(target.layouts)) if target.converted_names(i)]
        noted: dict[int, Any] = {i: writer.notes.get(f"layer {i}") for i in self._todo}
        # A journal that was changed by hand may hold anything: such a layer is converted again.
        done = {
            i for i in self._todo if isinstance(noted[i], dict) and set(target.converted_names(i)) <= writer.done
        }
        self._reports = {i: report for i, report in noted.items() if i in done}
        self._remaining = [i for i in self._todo if i not in done]
        self._devices = devices[: max(1, len(self._remaining))]
        self._context = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU cannot use it
        self._helpers: list[tuple[Any, Connection]] = []

    def __enter__(self) -> LayerSpread:
        self._counter = self._context.Value("l", 0) if len(self._devices) > 1 else None
        try:
            for device in self._devices[1:]:
                ours, theirs = self._context.Pipe()
                given = (theirs, self._job, self._remaining, self._counter, str(device), torch.get_num_threads())
                helper = self._context.Process(target=_help, args=given, daemon=True, name=f"headwise on {device}")
                helper.start()
                theirs.close()  # the helper's end alone is open: its death ends the connection
                self._helpers.append((helper, ours))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def convert(self) -> dict[int, dict[str, Any]]:
        """Convert and write every layer that remains.

        Returns:
            The reports of all converted layers by index, including those of an interrupted run.

        Raises:
            HeadwiseError: another process ended without its results, or raised this exception.
        """
        if not self._remaining:
            return self._reports
        job, writer = self._job, self._writer
        if self._helpers and job.calibration is not None and job.cache is not None:
            # Before other processes look for the text.
            keep_text(job.checkpoint, job.target, job.calibration, self._devices[0], self._progress, job.cache)
        self._progress.stage("Converting", total=len(self._todo), unit="layers")
        self._progress.expect(self._seconds * len(self._remaining) / len(self._todo), len(self._reports))
        for result in self._results():
            # The report comes before the tensors, so that an interruption between them does not lose it.
            writer.note(f"layer {result.layer}", result.report)
            for name, tensor in result.tensors.items():
                if name not in writer.done:
                    writer.write(name, tensor)
            self._reports[result.layer] = result.report
            self._progress.advance(1, layer=result.layer, **_figures(result.report))
            del result  # free its memory before the next layer is read
        self._end()
        return dict(sorted(self._reports.items()))

    def _results(self) -> Iterator[LayerResult]:
        """Yield the layers in the order in which they are done."""
        if self._counter is None:
            yield from self._job.results(self._remaining, self._devices[0], self._progress)
            return
        arrived: SimpleQueue[LayerResult | BaseException | None] = SimpleQueue()
        for helper, connection in self._helpers:
            with suppress(OSError):  # of a helper that is dead, which the thread finds too
                connection.send("begin")
            Thread(target=_receive, args=(connection, helper, arrived), daemon=True).start()
        ours_left, working = True, len(self._helpers)
        own = self._job.results(_take(self._remaining, self._counter), self._devices[0], self._progress)
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

    def _end(self) -> None:
        """End the other processes, which have nothing to lose."""
        for helper, _ in self._helpers:
            helper.terminate()
        for helper, _ in self._helpers:
            helper.join()
        self._helpers = []


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
        torch.empty(0, device=device)  # starts the device
        connection.recv()
        for result in job.results(_take(layers, counter), device, SILENT):
            # As arrays: torch would put the tensors into shared memory, which containers limit.
            packed = {n: (t.dtype, t.shape, as_bytes(t).numpy()) for n, t in result.tensors.items()}
            connection.send((result.layer, packed, result.report))
        connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
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
