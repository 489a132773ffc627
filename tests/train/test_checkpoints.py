"""A folder named checkpoint-STEP is whole, wherever the writing of one and the removal of another are cut off."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headwise.train.checkpoints import Checkpoints
from tests.faults.harness import KILL, Faults, attempt, contents, in_child

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="handles are told apart through /proc")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    def export(_: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    return Checkpoints(tmp_path / "training", {"weight": 4}, num_kept=1, export=export)


def write(checkpoints: Checkpoints, step: int) -> None:
    with checkpoints.writing(SimpleNamespace(should_save=True)):
        folder = checkpoints.staging / f"checkpoint-{step}"
        checkpoints.write_weights(folder, {"weight": torch.full((4,), float(step))})
        (folder / "trainer_state.json").write_text(str(step))


def steps(checkpoints: Checkpoints) -> list[int]:
    """Of all checkpoints there are, each of which must be whole."""
    found = checkpoints.all()
    for checkpoint in found:
        there = contents(checkpoint)
        assert {"trained.safetensors", "trainer_state.json", "model/config.json"} == there.keys(), checkpoint.name
        assert checkpoint.name == f"checkpoint-{there['trainer_state.json'].decode()}"
    return [int(checkpoint.name.rpartition("-")[2]) for checkpoint in found]


def killed(checkpoints: Checkpoints, at: int) -> bool:
    def job() -> None:
        with Faults(checkpoints.folder, "any", at, KILL)():
            write(checkpoints, 2)

    return os.WIFSIGNALED(os.waitpid(in_child(job), 0)[1])


def refused(operation: str) -> Callable[[Checkpoints, int], bool]:
    def refuse(checkpoints: Checkpoints, at: int) -> bool:
        faults = Faults(checkpoints.folder, operation, at, errno.EIO)
        with faults():
            message = attempt(lambda: write(checkpoints, 2))
        assert message is None or "cannot be written" in message
        assert message is not None or steps(checkpoints)[-1] == 2
        return faults.struck

    return refuse


@pytest.mark.parametrize("strike", [killed, refused("remove"), refused("rename")], ids=["kill", "remove", "rename"])
def test_a_checkpoint_is_whole_or_none(
    checkpoints: Checkpoints, strike: Callable[[Checkpoints, int], bool]
) -> None:
    struck, at, seen = True, 0, set()
    while struck:
        at += 1
        write(checkpoints, 1)
        struck = strike(checkpoints, at)
        left = steps(checkpoints)
        assert left in ([1], [1, 2], [2])
        seen.add(tuple(left))
        write(checkpoints, 3)  # as after --resume
        assert steps(checkpoints) == [3] and not list(checkpoints.staging.iterdir())
        os.rename(checkpoints.all()[0], checkpoints.staging / "done")
    assert at > 2 and (2,) in seen and len(seen) > 1
