"""Pushing under faults: a branch holds what it held or the whole folder, and a second push finishes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from headwise.convert.pipeline import convert_model
from headwise.records.push import push_model
from tests.convert.speaking import save_speaking
from tests.faults.harness import KILL, Faults, attempt, contents, in_child
from tests.faults.worlds import POOLED, SHAPE
from tests.hub_server import TOKEN, Hub, Repository, point_client_to, serve

REPO = "org/model"

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="handles are told apart through /proc")


class Remote:
    """A folder to push, and the Hub, which has no such repository yet or one with an older conversion."""

    def __init__(self, hub: Hub, folder: Path, older: Path | None) -> None:
        self.hub, self.folder, self.older = hub, folder, older
        self.sound = contents(folder)
        self.wanted, self.before = _shown(self.sound), _shown(contents(older)) if older else {}

    def reset(self) -> None:
        shutil.rmtree(self.hub.storage, ignore_errors=True)
        self.hub.storage.mkdir()
        self.hub.requests.clear()
        self.hub.repositories = {REPO: Repository({"main": self.older})} if self.older else {}

    def push(self) -> Any:
        return push_model(self.folder, REPO, token=TOKEN, unverified=True)

    def check(self) -> bool:
        """Whether the whole folder is there; an AssertionError unless that or nothing of it."""
        assert contents(self.folder) == self.sound, "the folder changed"
        found = self.hub.repositories.get(REPO)
        there = _shown(contents(found.folder("main"))) if found else {}
        assert there in (self.before, self.wanted), f"half a commit: {sorted(there)}"
        return there == self.wanted

    def finish(self) -> None:
        self.check()
        self.push()
        assert self.check(), "the second push did not finish"


def _shown(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files that a push uploads: hidden ones are local, or made by the Hub."""
    return {name: content for name, content in files.items() if not name.startswith(".")}


@pytest.fixture(params=["new", "older"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    source = save_speaking(tmp_path / "source", **SHAPE)
    convert_model(source, tmp_path / "out", max_shard_size=16_000, **POOLED)
    older = tmp_path / "older" if request.param == "older" else None
    if older:
        # In fewer files, which a push must delete.
        convert_model(source, older, **{**POOLED, "groups": 1})
    disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with serve({}, tmp_path / "hub") as hub:
        point_client_to(monkeypatch, hub, tmp_path / "cache")
        yield Remote(hub, tmp_path / "out", older)
    enable_progress_bars()


def failing(remote: Remote, monkeypatch: pytest.MonkeyPatch, at: int, times: int) -> bool:
    """Answer the `at`-th request, and those after it up to `times`, with an error 500; whether it came to that."""
    asked = 0

    def fails(_: str) -> bool:
        nonlocal asked
        asked += 1
        return at <= asked < at + times

    remote.reset()
    with monkeypatch.context() as patch:
        patch.setattr(remote.hub, "fails", fails)
        message = attempt(remote.push)
    assert message is not None or remote.check(), "reported as done, and is not"
    remote.finish()
    return asked >= at


def sweep(case: Callable[[int], bool], step: int = 1) -> int:
    """How many cases there were, from the first, every `step`-th, to the last that came to pass."""
    count = 0
    while case(1 + count * step):
        count += 1
    return count


@pytest.mark.parametrize(
    ("times", "step"),
    [(1, 5), pytest.param(1, 1, marks=pytest.mark.full), pytest.param(10_000, 1, marks=pytest.mark.full)],
)
def test_any_request_may_be_refused(remote: Remote, monkeypatch: pytest.MonkeyPatch, times: int, step: int) -> None:
    count = sweep(lambda at: failing(remote, monkeypatch, at, times), step)
    print(f"push, {times} errors 500 from a request on, every {step}: {count} faults survived")
    assert count > 2


@pytest.mark.full
def test_any_read_of_the_folder_may_fail(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(at: int) -> bool:
        remote.reset()
        faults = Faults(remote.folder, operation, at, error)
        with faults():
            message = attempt(remote.push)
        assert (message is None) == remote.check(), message
        assert message is None or "cannot be reached" not in message, message
        remote.finish()
        return faults.struck

    for operation, error in (("open", errno.EIO), ("open", errno.ENOENT), ("read", errno.EIO)):
        count = sweep(case)
        print(f"push, {operation}, {errno.errorcode[error]}: {count} faults survived")
        assert count > 3


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.full)])
def test_killed_at_any_request(remote: Remote, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def case(at: int) -> bool:
        asked, child = 0, 0

        def fails(_: str) -> bool:
            nonlocal asked
            asked += 1
            if asked == at:
                os.kill(child, signal.SIGKILL)
            return False

        remote.reset()
        with monkeypatch.context() as patch:
            patch.setattr(remote.hub, "fails", fails)
            child = in_child(remote.push)
            died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        remote.finish()
        return died

    count = sweep(case, step)
    print(f"push, killed at {count} requests, every {step}")
    assert count > 2


@pytest.mark.full
def test_killed_at_any_read_of_the_folder(remote: Remote) -> None:
    def case(at: int) -> bool:
        def job() -> None:
            with Faults(remote.folder, "any", at, KILL)():
                remote.push()

        remote.reset()
        died = os.WIFSIGNALED(os.waitpid(in_child(job), 0)[1])
        remote.finish()
        return died

    count = sweep(case)
    print(f"push, killed at {count} reads")
    assert count > 3
