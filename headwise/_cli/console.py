"""The one output sink. Results go to stdout; everything else (progress, notes, errors) goes to stderr.

Text from a checkpoint may hold terminal control sequences, so every string passes through `clean` on its way
out, and no string is ever read as rich markup.
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

LONGEST = 1500  # characters of a message
LINE_EVERY = 10.0  # seconds between two progress lines where there is no terminal
# Seconds before a process other than the first of several says what is wrong: mostly the first says the same, and
# the launcher ends the others with it.
OTHERS_WAIT = 20.0


@dataclass
class _Sink:
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)

    @cached_property
    def out(self) -> Console:
        return _console(self.stdout)

    @cached_property
    def err(self) -> Console:
        return _console(self.stderr)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Console(
        file=stream,
        markup=False,
        highlight=False,
        emoji=False,
        color_system="auto" if colour else None,
        width=None if stream.isatty() else 160,
    )


_sink = _Sink()


def configure(*, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
    """Choose what is shown, on the streams of this moment.

    Args:
        json: stdout carries the one object given to `result` and nothing else.
        quiet: no progress and no notes; results, warnings and errors remain.
        verbose: notes of detail are shown too.
    """
    global _sink
    _sink = _Sink(json, quiet, verbose)
    for stream in (_sink.stdout, _sink.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not end the job
            stream.reconfigure(errors="backslashreplace")


def clean_logs() -> None:
    """Let libraries log clean text only: they quote what they find in a checkpoint as it stands."""
    make = logging.getLogRecordFactory()
    if getattr(make, "clean", False):
        return

    def make_clean(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(Exception):  # a broken format is the logger's to report
            record.msg, record.args = "\n".join(map(clean, record.getMessage().split("\n"))), ()
        return record

    make_clean.clean = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_clean)


def say(text: object = "", style: str = "") -> None:
    """A line of the result for a reader (stdout; nothing under --json)."""
    if not _sink.json:
        _sink.out.print(clean(text), style=style, soft_wrap=True)


def say_block(text: str) -> None:
    """Lines of the result for a reader, as they stand (stdout; nothing under --json)."""
    for line in text.splitlines():
        say(line)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """A table of the result for a reader (stdout; nothing under --json).

    Args:
        columns: headings, or none; one that starts with ">" is a column of numbers, aligned to the right.
        rows: as many cells each as there are columns.
        title: a line above.
    """
    if _sink.json:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=bool(columns), header_style="bold"
    )
    for name in columns:
        drawn.add_column(
            clean(name.lstrip(">")), justify="right" if name.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    if title:
        say(title, style="bold")
    _sink.out.print(drawn)


def result(value: Any) -> None:
    """The object of --json (stdout; nothing without the flag). `value` is plain data or has `to_dict()`."""
    if _sink.json:
        _sink.stdout.write(jsonlib.dumps(plain(value), indent=2, allow_nan=False) + "\n")
        _sink.stdout.flush()


def note(text: object) -> None:
    """A line about the work (stderr; hushed by --quiet)."""
    if not _sink.quiet:
        _sink.err.print(clean(text), soft_wrap=True)


def detail(text: object) -> None:
    """A line that only --verbose shows (stderr)."""
    if _sink.verbose:
        note(text)


def warn(text: object) -> None:
    """A line that must not be missed (stderr)."""
    _sink.err.print(f"Warning: {clean(text)}", style="yellow", soft_wrap=True)


def error(message: str, hint: str | None = None) -> None:
    """Why the command ends, and what to type instead (stderr)."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT)
    _sink.err.print(f"Error: {clean(_shortened(message))}", style="bold red", soft_wrap=True)
    if hint:
        _sink.err.print(clean(_shortened(hint)), soft_wrap=True)


def _shortened(text: str) -> str:
    """A checkpoint decides how long the names in it are, and a sentence about them must stay one."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} ... {text[-200:]}"


def traceback(problem: BaseException) -> None:
    """The traceback of `problem` (stderr)."""
    for line in "".join(format_exception(problem)).splitlines():
        _sink.err.print(clean(line), soft_wrap=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Something that a long job can report to: bars on a terminal, plain lines elsewhere, silence if quiet."""
    if _sink.quiet:
        yield _OnlyWarnings()
    elif _sink.err.is_terminal and not _sink.err.is_dumb_terminal:
        listener = _Bars()
        with listener.bars:
            yield listener
            listener.finish()
    else:
        lines = _Lines()
        yield lines
        lines.finish()


class _OnlyWarnings(Progress):
    """What --quiet leaves."""

    warn = staticmethod(warn)


class _Lines(Progress):
    """A line when a stage takes long and one when it ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.name = ""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.finish()
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.start = self.spoke = self.moved = self.clock()

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.done += amount
        now = self.clock()
        self.moved = now if amount else self.moved
        if now - self.spoke < LINE_EVERY:
            return
        self.spoke = now
        parts = [amount_done(self.done, self.total, self.unit), *_figures(fields)]
        if self.total and self.done:
            left = (self.moved - self.start) * (self.total / self.done - 1) - (now - self.moved)
            parts.append(f"{duration(max(left, 0))} left")
        else:
            parts.append(f"{duration(now - self.start)} so far")
        note(f"{self.name}: {', '.join(parts)}")

    def finish(self) -> None:
        if self.name:
            took = duration(self.clock() - self.start)
            note(f"{self.name}: {amount_done(self.done, None, self.unit)} in {took}")
        self.name = ""

    note = staticmethod(note)
    warn = staticmethod(warn)


class _Bars(Progress):
    """One bar per stage; finished ones stay above as the record of the job."""

    def __init__(self) -> None:
        from rich import progress as bars

        self.bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=24),
            bars.TextColumn("{task.fields[amount]}", markup=False),
            bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            bars.TextColumn("{task.fields[figures]}", markup=False),
            console=_sink.err,
        )
        self.task: Any = None

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.finish()
        self.total, self.unit, self.done = total, unit, 0
        self.task = self.bars.add_task(clean(name), total=total, amount=amount_done(0, total, unit), figures="")

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.done += amount
        shown = amount_done(self.done, self.total, self.unit)
        self.bars.update(self.task, advance=amount, amount=shown, figures=", ".join(_figures(fields)))

    def finish(self) -> None:
        if self.task is not None and self.total is None:
            self.bars.update(self.task, total=self.done, completed=self.done)
        self.task = None

    note = staticmethod(note)
    warn = staticmethod(warn)


def amount_done(done: int, total: int | None, unit: str) -> str:
    """ "3/12 layers", "1.2/13.5 GB", or "12 layers" when the total is unknown."""
    if unit == "bytes":
        return size(done) if total is None else f"{size(done)} of {size(total)}"
    return f"{done:,}{'' if total is None else f'/{total:,}'} {unit}".rstrip()


def _figures(fields: Mapping[str, object]) -> list[str]:
    return [f"{clean(k)} {v:.4g}" if isinstance(v, float) else clean(f"{k} {v}") for k, v in fields.items()]
