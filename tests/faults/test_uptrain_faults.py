"""Uptraining under faults: OUT whole or absent, the input untouched, checkpoints good, --resume finishes."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert.verify.check import verify_model
from headwise.recipes import run
from headwise.recipes.settings import Data, Loss, Training, UptrainRecipe
from headwise.recipes.uptrain import uptrain_model
from headwise.records.manifest import RECORD
from headwise.train.checkpoints import WEIGHTS, Checkpoints
from tests.convert.speaking import save_speaking
from tests.faults.harness import World, attempt, in_child, kill_everywhere, sweep
from tests.faults.worlds import SHAPE

STEPS, BATCH = 2, 32
TRAINING = Training(
    tokens=STEPS * BATCH,
    batch_tokens=BATCH,
    learning_rate=1e-2,
    log_every=1,
    save_every=1,
    keep=1,
    precision="float32",
)

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="handles are told apart through /proc")


class Trained(World):
    """OUT is a trained folder, and there are checkpoints on the way to it."""

    def made(self) -> dict[str, bytes]:
        """Everything but the clock, which is in the curve and in the record, and what the record says of those."""
        assert verify_model(self.out, hashes=True).passed
        found = super().made()
        rows = csv.DictReader(io.StringIO(found["uptraining.csv"].decode()))
        curve = [{**row, "seconds": ""} for row in rows]
        record = json.loads(found.pop(RECORD))
        del record["files"], record["uptraining"][-1]["seconds"], found["README.md"]
        return {**found, "uptraining.csv": json.dumps(curve).encode(), "record": json.dumps(record).encode()}

    def check(self) -> str:
        state = super().check()
        if state == "new":
            return state  # what is left of the checkpoints is being removed
        checkpoints = Checkpoints(self.work / "training", {})
        last = checkpoints.last
        if last is not None:
            assert load_file(last / WEIGHTS) and load_file(last / "model" / "model.safetensors")
            assert torch.load(last / "optimizer.pt", weights_only=True)["state"]
            assert f"checkpoint-{json.loads((last / 'trainer_state.json').read_text())['global_step']}" == last.name
        for written in checkpoints.staging.glob("checkpoint-*"):
            step = int(written.name.rpartition("-")[2])
            assert step == 1 or last is not None, "a checkpoint is lost for one that is not complete"
        return state


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    # Drawing takes as long as training a tiny model.
    monkeypatch.setattr(run, "draw_curve", lambda *_, **__: None)
    source = save_speaking(tmp_path / "source", **SHAPE)
    text = tmp_path / "text.txt"
    held = tmp_path / "held.txt"
    for path in (text, held):
        path.write_text("def add(x, y):\n    return x + y\n\n\n" * 30)
    data = Data({str(text): 1}, 16, heldout=str(held), heldout_blocks=2)
    recipe = UptrainRecipe("tiny", data, TRAINING, loss=Loss(cross_entropy=1.0))

    def job(out: Path, resume: bool) -> Any:
        return uptrain_model(source, out, recipe=recipe, resume=resume)

    return Trained(tmp_path, source, job)


def limited(world: World, nbytes: int) -> bool:
    """Train where no file may grow beyond a size, whoever writes it; whether that was in the way."""

    def job() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
        message = attempt(lambda: world.job(world.out, False))
        assert message is None or "cannot be written" in message, message
        os._exit(3 if message else 0)

    world.reset()
    code = os.waitstatus_to_exitcode(os.waitpid(in_child(job), 0)[1])
    assert code in (0, 3), "no plain sentence"
    world.finish()
    return code == 3


def sizes(world: World) -> set[int]:
    """A byte less than each file that training writes needs, and half of it."""
    seen: set[int] = set()
    real = Checkpoints._publish

    def look(self: Checkpoints) -> None:
        seen.update(path.stat().st_size for path in self.staging.rglob("*") if path.is_file())
        real(self)

    world.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "_publish", look)
        world.job(world.out, False)
    # A world where not even the record fits is the conversions' test.
    return {part for size in seen if size > 4096 for part in (size - 1, size // 2)}


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_a_few_operations_fail(world: World, operation: str) -> None:
    assert sweep(world, operation, errno.ENOSPC, step={"write": 50, "fsync": 30, "rename": 12}[operation]) > 0


def test_a_few_moments_to_be_killed_at(world: World) -> None:
    assert kill_everywhere(world, step=300, offset=300).killed > 1


def test_a_file_that_torch_or_safetensors_cannot_finish(world: World) -> None:
    largest = max(sizes(world))
    assert limited(world, largest)


@pytest.mark.full
@pytest.mark.parametrize("operation", ["open", "read", "write", "fsync", "rename", "mkdir", "truncate", "remove"])
def test_any_operation_may_fail(world: World, operation: str) -> None:
    print(f"uptrain, {operation}: {sweep(world, operation, errno.EIO)} faults survived")


@pytest.mark.full
def test_any_file_may_be_too_large(world: World) -> None:
    found = [limited(world, nbytes) for nbytes in sorted(sizes(world))]
    print(f"uptrain: {sum(found)} of {len(found)} limits on the size of a file were met and survived")
    assert any(found)


@pytest.mark.full
def test_killed_at_every_third_operation(world: World) -> None:
    kills = kill_everywhere(world, step=3)
    print(f"uptrain: killed at {kills.killed} operations, {kills.states}")
    assert kills.killed > 100
