"""Spread independent work over devices: a process for each further device, and one counter of items.

Each further device has a process of its own, because Python bounds the conversion of a layer. Every process draws
items from one counter, so that devices of different speed, or a first process that is busy, leave no device idle.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Protocol

import torch

from headwise.errors import HeadwiseError
from headwise.progress import SILENT, Progress

# Seconds that processes get to end, and that a failure may take to arrive.
GRACE, MOMENT = 10.0, 2.0


class Work(Protocol):
    """Work on numbered items that do not depend on each other. Other processes get a pickled copy of it."""

    def results(self, items: Iterable[int], device: torch.device, progress: Progress) -> Iterator[Any]:
        """Yield the result of each item, which can be pickled.

        Args:
            items: ascending; each is drawn when the one before it is done.
            device: where the work is done.
            progress: receives notes.
        """


@dataclass(frozen=True)
class _Failure:
    """The exception of another process."""

    error: Exception
    trace: str


class DevicePool:
    """The processes of all devices but the first, which do work beside this process.

    Use it as a context manager. Entering starts the processes, which import and wait.

    Args:
        devices: where work is done, on the first of them by this process.
        kinds: of the work to come, whose modules the processes import while they wait.
    """

    def __init__(self, devices: Sequence[torch.device], kinds: Sequence[type[Work]] = ()) -> None:
        self._devices, self._kinds = devices, tuple(kinds)
        self._context = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU cannot use it
        self._helpers: list[tuple[Any, Connection]] = []

    def __enter__(self) -> DevicePool:
        self._counter = self._context.Value("l", 0)
        try:
            for device in self._devices[1:]:
                ours, theirs = self._context.Pipe()
                given = (theirs, self._counter, str(device), torch.get_num_threads(), self._kinds)
                helper = self._context.Process(target=_help, args=given, daemon=True, name=f"headwise on {device}")
                helper.start()
                theirs.close()  # the helper's end alone is open: its death ends the connection
                self._helpers.append((helper, ours))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the other processes, which have nothing to lose."""
        for helper, _connection in self._helpers:
            helper.terminate()
        end = time.monotonic() + GRACE
        for helper, _connection in self._helpers:
            helper.join(max(0.0, end - time.monotonic()))
            helper.kill()  # one that trains takes the first signal for a wish, and may wait for the others
            helper.join()
        self._helpers = []

    def begin(
        self,
        work: Work,
        items: Sequence[int],
        progress: Progress = SILENT,
        processes: int | None = None,
        *,
        together: bool = False,
    ) -> Iterator[Any]:
        """Begin work in the other processes, and return the results of all.

        All results of earlier work must have been read. This process takes part as soon as the results are read;
        what it does before that runs beside the others.

        Args:
            work: what is done.
            items: ascending.
            progress: receives the notes of this process.
            processes: that take part at most; None: all.
            together: the items are the places of processes that work together: this process takes the first of
                them, and no process ends before the others.

        Returns:
            An iterator over the results in the order in which they are done. It raises the exception of another
            process, and a HeadwiseError if one ended too early.
        """
        if not items:  # a resumed run may have all of them
            return iter(())
        arrived: SimpleQueue[Any] = SimpleQueue()
        helpers = self._helpers[: None if processes is None else max(0, processes - 1)]
        self._counter.value = int(together)
        for helper, connection in helpers:
            Thread(target=_exchange, args=(connection, helper, (work, items), arrived), daemon=True).start()
        ours = iter(items[:1]) if together else _take(items, self._counter)
        own = work.results(ours, self._devices[0], progress)
        return _merge(own, arrived, len(helpers))


def device_notes(devices: Sequence[torch.device], used: Sequence[torch.device], *, joint: bool) -> Iterator[str]:
    """Yield the lines of the plan about several devices.

    Args:
        devices: as `device` names them.
        used: where layers are converted.
        joint: whether they are trained together.
    """
    if len(devices) == 1:
        return
    if len(used) == 1:
        yield f"Layers are converted on {used[0]} alone: without moments the closed form needs no GPU."
    else:
        trained = " and trained" if joint else ""
        yield f"Layers are converted{trained}, and their damage is estimated, on {', '.join(map(str, used))}."
        yield f"All other work is done on {used[0]}."


def _merge(own: Iterator[Any], arrived: SimpleQueue[Any], working: int) -> Iterator[Any]:
    """Yield this process's results and those that arrive, until the other processes are done too."""
    ours_left = True
    while ours_left or working:
        if ours_left and arrived.empty():
            try:
                result = next(own, None)
            except Exception:
                # Processes that train together lose each other when one fails: the first reason is that one's.
                for late in _failures(arrived):
                    raise late from None
                raise
            ours_left = result is not None
        else:
            result = arrived.get()
            if isinstance(result, BaseException):
                raise result
            working -= result is None
        if result is not None:
            yield result
        del result  # free its memory before the next item is worked on


def _failures(arrived: SimpleQueue[Any]) -> Iterator[BaseException]:
    """Yield the failures of other processes that have arrived, or arrive within a moment."""
    with suppress(Empty):
        while True:
            result = arrived.get(timeout=MOMENT)
            if isinstance(result, BaseException):
                yield result


def _take(items: Sequence[int], counter: Any) -> Iterator[int]:
    """Yield items that no other process has taken, each when it is asked for."""
    while True:
        with counter.get_lock():
            place = counter.value
            counter.value += 1
        if place >= len(items):
            return
        yield items[place]


def _help(connection: Connection, counter: Any, name: str, threads: int, _kinds: tuple[type[Work], ...]) -> None:
    """Do the work that arrives, and send its results, in a further process.

    The modules of the kinds of work were imported with the arguments.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    torch.set_num_threads(threads)  # the number decides the order of sums
    device = torch.device(name)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(0, device=device)  # starts the device
        while True:
            _serve(connection, counter, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the first process is dead, or reports what an interrupted run keeps
    except Exception as error:
        try:
            connection.send(_Failure(error, traceback.format_exc()))
        except Exception:  # an exception that cannot be pickled
            connection.send(_Failure(RuntimeError(str(error)), traceback.format_exc()))


def _serve(connection: Connection, counter: Any, device: torch.device) -> None:
    """Do one piece of work, and send its results and None."""
    work, items = connection.recv()
    for result in work.results(_take(items, counter), device, SILENT):
        connection.send(result)
    connection.send(None)


def _exchange(connection: Connection, helper: Any, order: tuple[Work, Sequence[int]], arrived: Any) -> None:
    """Send work to a process, which may still be importing, and pass on its results."""
    try:
        connection.send(order)
    except OSError:
        pass  # a process that is dead is found below
    except Exception as error:  # work that cannot be pickled
        arrived.put(error)
        return
    _receive(connection, helper, arrived)


def _receive(connection: Connection, helper: Any, arrived: SimpleQueue[Any]) -> None:
    """Pass on what a process sends; its last message is None or its failure."""
    try:
        while (message := connection.recv()) is not None:
            if isinstance(message, _Failure):
                message.error.__cause__ = RuntimeError(message.trace)
                arrived.put(message.error)
                return
            arrived.put(message)
            del message
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
