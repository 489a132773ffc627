"""Run one call as the command would, and see whether a checkpoint got what it must never get.

Python's audit events tell what the interpreter is asked to do: while a call is watched, no process may start, no
socket may connect, no code from the checkpoint may be compiled or run, nothing may be written outside the folders
that are allowed. On top of that come a limit of processor time, a bound on memory, and the rule that every failure
is a sentence.
"""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import sys
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from headwise._cli import console
from headwise._cli.app import report_error

FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.sendto",
    "pickle.find_class",
    "builtins.input",
)
CHANGING = {
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "shutil.rmtree": (0,),
    "shutil.move": (0, 1),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Control, format, surrogates, line and paragraph separators: what a terminal obeys or hides.
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
MESSAGE = 4000


class Overtime(BaseException):
    """The call had its processor time."""


@dataclass
class Outcome:
    """`kind`: "done", "refused", or the name of an escape; `message` what the user would have read."""

    kind: str
    message: str
    value: Any = None
    escapes: tuple[str, ...] = ()


class Guard:
    """Watches calls. `home` is where checkpoints lie, `allowed` where may be written; `seconds` of CPU for each."""

    def __init__(self, home: Path, allowed: Path, seconds: float = 10.0, memory: int = 1 << 30) -> None:
        self.home, self.allowed = os.path.realpath(home), os.path.realpath(allowed)
        self.seconds, self.memory = seconds, memory
        self.seen: list[str] = []

    def watch(self, call: Callable[[], Any], show: Callable[[Any], None] = lambda value: None) -> Outcome:
        """Call, show the result as the command does, and judge."""
        self.seen = []
        stdout, stderr = io.StringIO(), io.StringIO()
        before = peak()
        value, kind = None, "done"
        with redirect_stdout(stdout), redirect_stderr(stderr), mock.patch("builtins.input", _asked(self)):
            console.configure(quiet=True)
            _install(self)
            signal.signal(signal.SIGPROF, _overtime)
            signal.setitimer(signal.ITIMER_PROF, self.seconds)
            try:
                value = call()
                show(value)
            except Overtime:
                kind = "overtime"
            except BaseException as problem:
                kind = "refused"
                code = report_error(problem)
                if "This is a bug" in stderr.getvalue():
                    kind = f"bug: {type(problem).__name__}"
                elif code == 130:
                    kind = "interrupted"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                _install(None)
        console.configure()
        message = stdout.getvalue() + stderr.getvalue()
        escapes = [*self.seen]
        if kind not in ("done", "refused"):
            escapes.append(kind)
        if kind == "refused" and (
            message.count("\nError: ") + message.startswith("Error: ") != 1 or len(message) > MESSAGE
        ):
            escapes.append(f"not a sentence: {len(message)} characters")
        unsafe = {c for c in set(message) - {"\n"} if unicodedata.category(c) in UNSAFE}
        if unsafe:
            escapes.append(f"control characters {unsafe} in the output")
        grown = peak() - before
        if grown > self.memory:
            escapes.append(f"memory grew by {grown >> 20} MiB")
        if kind == "overtime":
            gc.collect()
        return Outcome(kind, message, value, tuple(escapes))

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """One audit event of the interpreter."""
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event in CHANGING:
            for place in CHANGING[event]:
                # Relative to a folder that was opened before: how a tree is removed.
                if not any(type(a) is int and a > 2 for a in arguments[1:]):
                    self._must_be_allowed(event, arguments[place])
        elif event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & WRITING) or (isinstance(mode, str) and set(mode) & set("wax+"))
            if writes and not isinstance(path, int):
                # A link is then not followed: the system refuses to open it.
                self._must_be_allowed(event, path, follows=not (flags or 0) & os.O_NOFOLLOW)
        elif event in ("compile", "exec"):
            code = arguments[0] if event == "exec" else arguments[1]
            name = getattr(code, "co_filename", code)
            if isinstance(name, str) and (name.startswith(self.home) or "modeling_evil" in name):
                self.seen.append(f"{event} of {name}")

    def _must_be_allowed(self, event: str, path: Any, follows: bool = True) -> None:
        if isinstance(path, int):
            return
        folder, name = os.path.split(os.fsdecode(path))
        real = os.path.realpath(os.fsdecode(path)) if follows else os.path.join(os.path.realpath(folder), name)
        if not (real.startswith(self.allowed) or real in ("/dev/null",)):
            self.seen.append(f"{event} {real!r:.200}")


def peak() -> int:
    """Bytes of the most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _overtime(number: int, frame: Any) -> None:
    raise Overtime


def _asked(guard: Guard) -> Callable[..., str]:
    def asked(*arguments: Any) -> str:
        guard.seen.append("asked the user for an answer")
        return "y"

    return asked


_current: Guard | None = None
_hooked = False


def _install(guard: Guard | None) -> None:
    global _current, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # it can never be removed
        _hooked = True
    _current = guard


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    guard = _current
    if guard is not None:
        guard.hear(event, arguments)
