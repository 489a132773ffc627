"""Whatever fails, and wherever the process dies: no OUT or a whole one, the source untouched, --resume finishes."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from headwise.io.writer import Writer
from tests.faults.harness import (
    OPERATIONS,
    REFUSALS,
    Faults,
    World,
    attempt,
    contents,
    in_child,
    kill_at_random,
    kill_everywhere,
    sweep,
)
from tests.faults.worlds import make

LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="handles are told apart through /proc")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make(tmp_path)


@LINUX
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_operation_may_fail(world: World, operation: str) -> None:
    # Of the many openings and writes only some; the long check below takes each.
    assert sweep(world, operation, REFUSALS[operation][0], step={"open": 4, "write": 2}.get(operation, 1)) > 0


@pytest.mark.full
@LINUX
@pytest.mark.parametrize("scenario", ["fresh", "replace", "resume"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_operation_may_fail_in_any_way(tmp_path: Path, scenario: str, operation: str) -> None:
    world = make(tmp_path, scenario)
    count = sum(sweep(world, operation, error) for error in REFUSALS[operation])
    print(f"{scenario}, {operation}: {count} faults survived")


@pytest.mark.full
@LINUX
@pytest.mark.parametrize("operation", ["write", "fsync", "open"])
def test_a_disk_may_stay_full(tmp_path: Path, operation: str) -> None:
    world = make(tmp_path)
    print(f"lasting, {operation}: {sweep(world, operation, errno.ENOSPC, lasting=True)} faults survived")


@pytest.mark.full
@LINUX
@pytest.mark.parametrize("kind", ["optimal", "refit", "mla"])
def test_calibrated_conversions_may_fail(tmp_path: Path, kind: str) -> None:
    world = make(tmp_path, kind=kind)
    count = sum(sweep(world, operation, errno.EIO) for operation in ("write", "rename", "fsync"))
    print(f"{kind}: {count} faults survived")


@LINUX
def test_killed_at_every_sixteenth_operation(world: World) -> None:
    kills = kill_everywhere(world, step=16)
    assert kills.killed > 10 and kills.states["none"] > 5


@pytest.mark.full
@LINUX
@pytest.mark.parametrize("scenario", ["fresh", "replace", "resume"])
def test_killed_at_every_operation(tmp_path: Path, scenario: str) -> None:
    kills = kill_everywhere(make(tmp_path, scenario))
    print(f"{scenario}: killed at each of {kills.killed} operations, {kills.states}")
    assert kills.killed > 100


def test_killed_at_random_moments(world: World) -> None:
    assert kill_at_random(world, 8, Random(0)).killed == 8


@pytest.mark.full
@pytest.mark.parametrize("scenario", ["fresh", "replace", "resume"])
def test_killed_at_random_moments_again_and_again(tmp_path: Path, scenario: str) -> None:
    kills = kill_at_random(make(tmp_path, scenario), 110, Random(scenario))
    print(f"{scenario}: {kills.killed} kills at random moments, {kills.finished} too late, {kills.states}")
    assert kills.killed >= 110


def test_a_second_writer_is_refused_until_the_first_is_dead(world: World) -> None:
    real = Writer.finish

    def wait(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "finish", wait)
        first = in_child(lambda: world.job(world.out, False))
        assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
    for resume in (False, True):
        message = attempt(lambda resume=resume: world.job(world.out, resume))  # type: ignore[misc]
        assert message is not None and f"is being written by process {first} on" in message
    assert world.check() == "none"
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert (world.work / "owner").exists()  # stale, and seen to be
    world.finish()


@pytest.mark.parametrize("change", ["size", "time", "header"])
def test_a_source_that_changes_meanwhile(world: World, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    file = world.source / "model.safetensors"
    content, status = file.read_bytes(), file.stat()
    real, calls = Writer.copy, 0

    def copy(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            file.write_bytes(content + b"x" if change == "size" else content.replace(b"up_proj", b"uq_proj"))
            later = 0 if change == "header" else 1
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + later))
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "copy", copy)
        message = attempt(lambda: world.job(world.out, False))
    assert message is not None and "changed while it was being read" in message
    assert not world.out.exists() and not world.work.exists()
    file.write_bytes(content)
    world.job(world.out, False)
    # The record names no times.
    assert contents(world.out) == world.whole


def test_a_file_system_that_cannot_rename_folders(world: World) -> None:
    faults = Faults(world.home, "rename", 1, errno.EXDEV)
    with faults():
        message = attempt(lambda: world.job(world.out, False))
    assert message is not None and "cannot rename folders" in message and "another file system" in message
    assert not list(world.out.parent.iterdir())  # before any work was done


def test_a_rename_that_copies(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(os, "rename", lambda a, b: shutil.copytree(a, b))
    message = attempt(lambda: world.job(world.out, False))
    assert message is not None and "not atomic" in message
    assert not list(world.out.parent.iterdir())


def test_a_target_that_may_only_be_read(world: World) -> None:
    faults = Faults(world.home, "mkdir", 1, errno.EROFS, lasting=True)
    with faults():
        message = attempt(lambda: world.job(world.out, False))
    assert message is not None and "the file system is read-only" in message and "--resume" not in message
    assert not list(world.out.parent.iterdir())


def test_half_a_journal_line_in_the_middle(world: World) -> None:
    """A full disk takes half a line; another thread's whole line may follow it."""
    began = in_child(lambda: _stop_at_finish(world))
    os.waitpid(began, 0)
    journal = world.work / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:9] + b"".join(lines[4:]))
    world.finish()


def _stop_at_finish(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "finish", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        world.job(world.out, False)
