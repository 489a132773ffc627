"""Make the operating system refuse, or the process die, at the n-th thing that it is asked to do.

`sweep` runs a job again and again, with the first, the second, the third ... operation of one kind failing, until
the job runs through because there was no such operation left. After each the world must be in order, and the same
job with `resume` must finish as if nothing had happened.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, cast
from unittest import mock

import torch

from headwise._cli import console
from headwise._cli.app import report_error

OPERATIONS = ("open", "read", "write", "fsync", "rename", "mkdir", "truncate", "remove", "memory")
# What each kind of operation may be refused with.
REFUSALS: dict[str, tuple[int, ...]] = {
    "open": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EMFILE),
    "read": (errno.EIO, errno.ESTALE),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "rename": (errno.EIO, errno.ENOSPC, errno.EXDEV, errno.EACCES),
    "mkdir": (errno.ENOSPC, errno.EDQUOT, errno.EROFS),
    "truncate": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "remove": (errno.EIO, errno.EACCES),
    "memory": (errno.ENOMEM,),
}
KILL = -1


class Faults:
    """Count operations on files below `folder`; refuse operation number `at` of one kind, from 1.

    Args:
        operation: one of `OPERATIONS`, or "any" for whichever comes n-th.
        error: an errno, or `KILL`: the process dies without a chance to tidy up.
        lasting: all later operations of the kind fail too, as on a disk that is full.
    """

    def __init__(self, folder: Path, operation: str, at: int, error: int, *, lasting: bool = False) -> None:
        self.folder, self.operation, self.at, self.error = str(folder), operation, at, error
        self.lasting = lasting
        self.count = 0

    @property
    def struck(self) -> bool:
        return self.count >= self.at

    def meet(self, operation: str, place: Any = None) -> None:
        """An operation is about to happen."""
        if self.operation not in (operation, "any"):
            return
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at):
            if self.error == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            if operation == "memory":
                raise MemoryError if self.at % 2 else RuntimeError(NO_MEMORY)
            # As the system does it: what names a file says which, what has a handle does not know.
            named = (os.fsdecode(place),) if place is not None and not isinstance(place, int) else ()
            raise OSError(self.error, os.strerror(self.error), *named)

    def watches(self, place: Any) -> bool:
        """Whether a path or an open handle is below the folder."""
        if isinstance(place, int):
            try:
                place = os.readlink(f"/proc/self/fd/{place}")
            except OSError:
                return False
        try:
            return os.path.abspath(os.fsdecode(place)).startswith(self.folder)
        except TypeError:
            return False

    @contextmanager
    def __call__(self) -> Iterator[Faults]:
        with mock.patch.multiple(os, **cast(Any, {name: self._watched(*row) for name, row in _CALLS(os).items()})):
            opened = self._opened(builtins.open)
            with (
                mock.patch.object(builtins, "open", opened),
                mock.patch.object(io, "open", opened),
                mock.patch.object(torch, "empty", self._allocating(torch.empty)),
            ):
                yield self

    def _watched(self, real: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def call(place: Any, *more: Any, **named: Any) -> Any:
            if self.watches(place) or named.get("dir_fd") is not None:
                if operation == "write" and self.count + 1 == self.at and self.operation in ("write", "any"):
                    # A disk fills up in the middle of a write.
                    half = bytes(more[0])[: len(more[0]) // 2]
                    real(place, half, *more[1:])
                self.meet(operation, place)
            return real(place, *more, **named)

        return call

    def _allocating(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def empty(*shape: Any, **named: Any) -> Any:
            if str(named.get("device")) != "meta":
                self.meet("memory")
            return real(*shape, **named)

        return empty

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        faults = self

        class File(io.FileIO):
            def read(self, size: int | None = -1) -> Any:
                faults.meet("read")
                return super().read(size)

            def readall(self) -> Any:
                faults.meet("read")
                return super().readall()

            def readinto(self, buffer: Any) -> Any:
                faults.meet("read")
                return super().readinto(buffer)

            def write(self, content: Any) -> Any:
                faults.meet("write")
                return super().write(content)

        def opened(
            place: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
            newline: Any = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not self.watches(place):
                return real(place, mode, buffering, encoding, errors, newline, closefd, opener)
            self.meet("open", place)
            raw = File(place, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            buffered = kind(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return opened


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


def _CALLS(module: Any) -> dict[str, tuple[Callable[..., Any], str]]:
    names = {
        "open": "open",
        "write": "write",
        "pwrite": "write",
        "fsync": "fsync",
        "rename": "rename",
        "replace": "rename",
        "mkdir": "mkdir",
        "truncate": "truncate",
        "ftruncate": "truncate",
        "unlink": "remove",
        "rmdir": "remove",
    }
    return {name: (getattr(module, name), operation) for name, operation in names.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class World:
    """A source, a job that makes OUT from it, and what OUT must be.

    `job(out, resume)` runs to its end or raises; `before` puts things in place first, such as an OUT to replace.
    """

    home: Path
    source: Path
    job: Callable[[Path, bool], Any]
    before: Callable[[Path], None] = lambda out: None
    whole: dict[str, bytes] = field(default_factory=dict)
    old: dict[str, bytes] | None = None
    sound: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sound = contents(self.source)
        self.out = self.home / "target" / "out"
        self.reset()
        self.job(self.out, self.work.exists())
        self.whole = self.made()
        self.reset()
        self.old = self.made() if self.out.exists() else None

    @property
    def work(self) -> Path:
        return self.out.parent / f".{self.out.name}.headwise-work"

    def made(self) -> dict[str, bytes]:
        """What is in OUT, but for what two runs of the same job may differ in."""
        return contents(self.out)

    def reset(self) -> None:
        """Begin anew."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir(parents=True)
        self.before(self.out)

    def check(self) -> str:
        """The state after a fault: "none", "old" or "new"; an AssertionError if it is any other."""
        assert contents(self.source) == self.sound, "the source changed"
        others = {path.name for path in self.out.parent.iterdir()} - {self.out.name, self.work.name}
        assert not others, f"left behind: {others}"
        if not self.out.exists():
            # A process that died between the two renames of a replacement: the next run puts the old one back.
            assert self.old is None or contents(self.work / "replaced") == self.old, "the old OUT is lost"
            return "none"
        found = self.made()
        assert found in (self.whole, self.old), "OUT is neither whole nor the old one"
        return "new" if found == self.whole else "old"

    def finish(self) -> None:
        """The user goes on: the same command, with --resume where there is something to resume."""
        if self.check() != "new":
            self.job(self.out, self.work.exists())
        assert self.check() == "new", "the resumed job did not finish"
        if self.work.exists():  # it died after the rename; the next command says so and tidies up
            message = attempt(lambda: self.job(self.out, True))
            # There is no message where --force replaced it.
            assert message is None or "complete" in message or "exists already" in message, message
            assert self.check() == "new"
        assert not self.work.exists(), "the work folder is still there"


def attempt(call: Callable[[], Any]) -> str | None:
    """Run as the command would: None when it succeeds, or what the user reads. Never a traceback."""
    stream = io.StringIO()
    try:
        call()
    except BaseException as problem:
        with redirect_stderr(stream):
            console.configure(quiet=True)
            report_error(problem)
        console.configure()
        message = stream.getvalue()
        assert message.startswith("Error: ") and "This is a bug" not in message, message
        return message
    return None


def sweep(world: World, operation: str, error: int, *, lasting: bool = False, step: int = 1) -> int:
    """Fail each operation of a kind, or every `step`-th, until there is none left; how many were failed."""
    for at in count(step, step):
        world.reset()
        faults = Faults(world.home, operation, at, error, lasting=lasting)
        with faults():
            message = attempt(lambda: world.job(world.out, world.work.exists()))
        where = f"{operation} {at}, {errno.errorcode.get(error, error)}: {message}"
        try:
            if message is None:
                # Some failures are survived without a word, such as one while tidying up.
                assert world.check() == "new"
            world.finish()
        except (AssertionError, Exception) as problem:
            raise AssertionError(f"{where}: {problem}") from problem
        if not faults.struck:
            return at // step - 1
    raise AssertionError(f"{operation} never ran out")


@dataclass
class Kills:
    """What became of processes that were killed: how many were, and where that left the world."""

    killed: int = 0
    finished: int = 0
    states: dict[str, int] = field(default_factory=dict)


def in_child(call: Callable[[], Any]) -> int:
    """Start `call` in a process that has everything imported already; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:  # pragma: no cover
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        call()
        os._exit(0)
    except BaseException:
        os._exit(1)


def kill_everywhere(world: World, step: int = 1, offset: int = 1) -> Kills:
    """Kill the job at its first, second, ... operation of any kind (every `step`-th), until it gets through."""
    kills = Kills()
    at = offset
    while True:
        world.reset()
        faults = Faults(world.home, "any", at, KILL)

        def job(faults: Faults = faults) -> None:
            with faults():
                world.job(world.out, world.work.exists())

        status = os.waitpid(in_child(job), 0)[1]
        _account(world, kills, status, f"operation {at}")
        if not os.WIFSIGNALED(status):
            return kills
        at += step


def kill_at_random(world: World, count: int, random: Random) -> Kills:
    """Kill the job at random moments, `count` times; sometimes what resumes is killed again."""
    kills = Kills()
    seconds = _duration(world)
    while kills.killed < count:
        pid = in_child(lambda: world.job(world.out, world.work.exists()))
        time.sleep(random.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        again = random.random() < 0.5
        _account(world, kills, status, f"kill {kills.killed}", finish=not again)
        if not again or world.check() == "new":
            world.reset()
        seconds = _duration(world) if kills.finished > kills.killed + 10 else seconds
    return kills


def _duration(world: World) -> float:
    world.reset()
    began = time.monotonic()
    os.waitpid(in_child(lambda: world.job(world.out, world.work.exists())), 0)
    seconds = 1.1 * (time.monotonic() - began)
    world.reset()
    return seconds


def _account(world: World, kills: Kills, status: int, where: str, *, finish: bool = True) -> None:
    if os.WIFSIGNALED(status):
        kills.killed += 1
    else:
        kills.finished += 1
        assert os.WEXITSTATUS(status) == 0, f"{where}: the job failed"
    try:
        state = world.check()
        kills.states[state] = kills.states.get(state, 0) + 1
        if finish:
            world.finish()
    except (AssertionError, Exception) as problem:
        raise AssertionError(f"{where}: {problem}") from problem
