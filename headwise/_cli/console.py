"""Write results to stdout, and everything else (progress, notes, errors) to stderr: the one output sink.

Text from a checkpoint may hold terminal control sequences. Every string therefore passes through `clean` before it
is written, and no string is parsed as rich markup.
"""

from __future__ import annotations

import json as jsonlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from traceback import format_exception
from typing import TYPE_CHECKING, Any, TextIO

from headwise.format import clean, duration, plain, size
from headwise.progress import Progress

if TYPE_CHECKING:  # rich takes longer to import than `headwise --help` may
    from rich.console import Console

MAX_MESSAGE = 1500  # characters
FILE_WIDTH = 100  # columns of a table where there is no terminal
LINE_INTERVAL = 10.0  # seconds between two progress lines where there is no terminal
# Seconds that a process other than the first waits before it prints an error. Most often the first process has the
# same error, and the launcher then ends the others.
OTHERS_WAIT = 20.0


@dataclass
class _Sink:
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    translate: Callable[[str], str] = str
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)

    @cached_property
    def out(self) -> Console:
        return _console(self.stdout)

    @cached_property
    def err(self) -> Console:
        return _console(self.stderr)


def discard(stream: TextIO) -> None:
    """Send what is written to a stream from now on to nowhere: its reader has closed the pipe.

    Args:
        stream: stdout or stderr.
    """
    with suppress(OSError, ValueError):  # a stream in memory has no descriptor
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, stream.fileno())
        os.close(handle)


def flush() -> None:
    """Write what is left in stdout and stderr, so that a closed pipe does not change the exit code afterwards."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            discard(stream)


def _console(stream: TextIO) -> Console:
    from rich import console

    class Console(console.Console):
        def on_broken_pipe(self) -> None:
            """Go on without the reader: a closed pipe changes neither the work nor the exit code."""
            self.quiet = True
            discard(stream)

    colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Console(
        file=stream,
        markup=False,
        highlight=False,
        emoji=False,
        color_system="auto" if colour else None,
        width=None if stream.isatty() or os.environ.get("COLUMNS") else FILE_WIDTH,
    )


_sink = _Sink()


def configure(
    *, json: bool = False, quiet: bool = False, verbose: bool = False, translate: Callable[[str], str] = str
) -> None:
    """Choose what is shown, on the present stdout and stderr.

    Args:
        json: stdout carries the one object given to `print_json` and nothing else.
        quiet: no progress and no notes; results, warnings and errors remain.
        verbose: details are shown too.
        translate: changes messages and the cells of tables, such as field names of the library to flags.
    """
    global _sink
    _sink = _Sink(json, quiet, verbose, translate)
    for stream in (_sink.stdout, _sink.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show must not end the job
            stream.reconfigure(errors="backslashreplace")


def clean_logs() -> None:
    """Make libraries log clean text only: they quote strings of a checkpoint unchanged."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "clean", False):
        return

    def make_clean(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = factory(*arguments, **named)
        with suppress(Exception):  # the logger reports a broken format
            record.msg, record.args = "\n".join(map(clean, record.getMessage().split("\n"))), ()
        return record

    make_clean.clean = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_clean)


def print_line(text: object = "", style: str = "") -> None:
    """Print a line of the result for a reader (stdout; nothing with --json)."""
    if not _sink.json:
        _sink.out.print(_to_text(text), style=style, soft_wrap=True)


def print_lines(text: str) -> None:
    """Print lines of the result for a reader, unchanged (stdout; nothing with --json)."""
    for line in () if _sink.json else text.splitlines():
        _sink.out.print(clean(line), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print a table of the result for a reader (stdout; nothing with --json).

    Args:
        columns: headings, or none; a heading that starts with ">" is of a column of numbers, aligned to the right.
        rows: as many cells each as there are columns. A cell that does not fit wraps, one of a number does not.
        title: a line above the table.
    """
    if _sink.json:
        return
    cells = [[_to_text(cell) for cell in row] for row in rows]
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=bool(columns), header_style="bold"
    )
    for place, name in enumerate(columns):
        number = name.startswith(">")
        table.add_column(
            clean(name.lstrip(">")),
            justify="right" if number else "left",
            overflow="fold",
            min_width=max((len(row[place]) for row in cells), default=None) if number else None,
        )
    for row in cells:
        table.add_row(*map(Text, row))
    if title:
        print_line(title, style="bold")
    if _sink.stdout.isatty():
        _sink.out.print(table)
        return
    with _sink.out.capture() as captured:
        _sink.out.print(table)
    for line in captured.get().splitlines():  # a file gets no spaces at the end of a line
        _sink.out.out(line.rstrip(), highlight=False)


def print_json(value: Any) -> None:
    """Print the one object of --json (stdout; nothing without the flag).

    Args:
        value: plain data, or an object with `to_dict()`.
    """
    if _sink.json:
        try:
            _sink.stdout.write(jsonlib.dumps(plain(value), indent=2, allow_nan=False) + "\n")
            _sink.stdout.flush()
        except BrokenPipeError:
            discard(_sink.stdout)


def note(text: object) -> None:
    """Print a line about the work (stderr; nothing with --quiet)."""
    if not _sink.quiet:
        _sink.err.print(_to_text(text), soft_wrap=True)


def detail(text: object) -> None:
    """Print a line that only --verbose shows (stderr)."""
    if _sink.verbose:
        note(text)


def warn(text: object) -> None:
    """Print a line that the user must not miss (stderr)."""
    _sink.err.print(f"Warning: {_to_text(text)}", style="yellow", soft_wrap=True)


def error(message: str, hint: str | None = None) -> None:
    """Print why the command ends, and what to do (stderr)."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT)
    _sink.err.print(f"Error: {_to_text(_shorten(message))}", style="bold red", soft_wrap=True)
    if hint:
        _sink.err.print(_to_text(_shorten(hint)), soft_wrap=True)


def _to_text(text: object) -> str:
    return clean(_sink.translate(str(text)))


def _shorten(text: str) -> str:
    """Bound the length of a message: the names in a checkpoint may have any length."""
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 200]} ... {text[-200:]}"


def traceback(problem: BaseException) -> None:
    """Print the traceback of an exception (stderr)."""
    for line in "".join(format_exception(problem)).splitlines():
        _sink.err.print(clean(line), soft_wrap=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a listener for a long job: bars on a terminal, lines elsewhere, only warnings with --quiet."""
    if _sink.quiet:
        yield _OnlyWarnings()
    elif _sink.err.is_terminal and not _sink.err.is_dumb_terminal:
        bars = _Bars()
        with bars.display:
            yield bars
            bars.finish()
    else:
        lines = _Lines()
        yield lines
        lines.finish()


class _OnlyWarnings(Progress):
    """Print warnings and nothing else."""

    warn = staticmethod(warn)


class _Pace:
    """How much of a stage is done, and the seconds that the rest takes.

    Before anything is done the rest is the forecast. Afterwards it follows from the speed since the first advance:
    the first one is slow, because it loads libraries and fills caches. Results of a batch arrive one by one at
    almost the same time. The speed therefore counts from mark to mark, and an advance soon after a mark is none.
    """

    # Share of the time so far that lies between two marks at least.
    SPACING = 0.1
    # Share of the total from which the first advance alone gives a speed: less may be the first result of a batch.
    ENOUGH = 0.05

    def __init__(self, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self.total, self.unit, self.clock = total, unit, clock
        self.done = self.earlier = 0
        self.forecast: float | None = None
        self.start = clock()
        # Time, and the amount that was done then, of the first and of the last mark.
        self.first: tuple[float, int] | None = None
        self.last: tuple[float, int] | None = None

    def expect(self, seconds: float, done: int) -> None:
        """Take over a forecast, and what an interrupted run has done."""
        self.forecast = seconds
        self.done = self.earlier = done

    def advance(self, amount: int) -> None:
        """Count work that is done now."""
        self.done += amount
        now = self.clock()
        if amount and (self.last is None or now - self.last[0] > self.SPACING * (self.last[0] - self.start)):
            self.last = now, self.done
            self.first = self.first or self.last

    @property
    def elapsed(self) -> float:
        """Return the seconds since the stage began."""
        return self.clock() - self.start

    @property
    def amount(self) -> str:
        """Return what is done of the total."""
        return format_amount_done(self.done, self.total, self.unit)

    @property
    def left(self) -> float | None:
        """Return the seconds that are left; None: nothing is known of them."""
        if self.total and self.done >= self.total:
            return 0.0
        first = self.first
        if self.total and first == self.last and self.done - self.earlier >= self.ENOUGH * self.total:
            first = self.start, self.earlier
        if self.total and first and self.last and self.last != first:
            each = (self.last[0] - first[0]) / (self.last[1] - first[1])
            return max(0.0, each * (self.total - self.last[1]) - (self.clock() - self.last[0]))
        return None if self.forecast is None else max(0.0, self.forecast - self.elapsed)

    @property
    def time(self) -> str:
        """Return the time that is left, or else the time so far."""
        left = self.left
        return f"{duration(self.elapsed)} so far" if left is None else f"{duration(left)} left"


class _Lines(Progress):
    """Print a line every `LINE_INTERVAL` seconds of a stage, and one at its end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.name = ""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.finish()
        self.name, self.pace = name, _Pace(total, unit, self.clock)
        self.last_line = self.pace.start

    def expect(self, seconds: float, done: int = 0) -> None:
        self.pace.expect(seconds, done)
        if seconds >= LINE_INTERVAL:
            note(f"{self.name}: {self.pace.amount}, {self.pace.time} by the forecast")

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.pace.advance(amount)
        now = self.clock()
        if now - self.last_line < LINE_INTERVAL:
            return
        self.last_line = now
        note(f"{self.name}: {', '.join([self.pace.amount, *_format_fields(fields), self.pace.time])}")

    def finish(self) -> None:
        if self.name:
            pace = self.pace
            amount = f"{format_amount_done(pace.done, None, pace.unit)} in " if pace.unit or pace.done else ""
            note(f"{self.name}: {amount}{duration(pace.elapsed)}")
        self.name = ""

    note = staticmethod(note)
    warn = staticmethod(warn)


class _Bars(Progress):
    """Draw one bar per stage; the bars of finished stages stay above it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from rich import progress
        from rich.text import Text

        class Remaining(progress.ProgressColumn):
            """The time left. The column of rich forgets all units that took longer than half a minute."""

            def render(self, task: progress.Task) -> Text:
                """Return the time left of a stage, or the time that it took."""
                pace: _Pace = task.fields["pace"]
                return Text(duration(task.finished_time or 0.0) if task.finished else pace.time)

        self.clock = clock
        self.display = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[pace].amount}", markup=False),
            Remaining(),
            progress.TextColumn("{task.fields[details]}", markup=False),
            console=_sink.err,
        )
        self.task: Any = None

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.finish()
        self.pace = _Pace(total, unit, self.clock)
        self.task = self.display.add_task(clean(name), total=total, pace=self.pace, details="")

    def expect(self, seconds: float, done: int = 0) -> None:
        self.pace.expect(seconds, done)
        self.display.update(self.task, completed=done)

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.pace.advance(amount)
        self.display.update(self.task, advance=amount, details=", ".join(_format_fields(fields)))

    def finish(self) -> None:
        if self.task is not None and self.pace.total is None:
            self.display.update(self.task, total=self.pace.done, completed=self.pace.done)
        self.task = None

    note = staticmethod(note)
    warn = staticmethod(warn)


def format_amount_done(done: int, total: int | None, unit: str) -> str:
    """Return "3/12 layers", "1.2 GB of 13.5 GB", or "12 layers" where the total is unknown."""
    if unit == "bytes":
        return size(done) if total is None else f"{size(done)} of {size(total)}"
    return f"{done:,}{'' if total is None else f'/{total:,}'} {unit}".rstrip()


def _format_fields(fields: Mapping[str, object]) -> list[str]:
    return [f"{clean(k)} {v:.4g}" if isinstance(v, float) else clean(f"{k} {v}") for k, v in fields.items()]
