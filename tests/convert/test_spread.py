"""Layers on several devices: the bytes of one device, and what happens if a process fails or is killed."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwise.convert import spread
from headwise.convert.layers import LayerJob
from headwise.convert.pipeline import convert_model
from headwise.convert.plan import Plan
from headwise.convert.spread import DevicePool
from headwise.convert.verify.layer_damage import LayerDamage
from headwise.errors import HeadwiseError, SettingError
from tests.convert.speaking import TEXT, contents, save_speaking

CPU = torch.device("cpu")
OPTIONS = {"to": "gqa", "groups": 2, "refit": 3, "verify": False, **TEXT}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "model"
    return save_speaking(folder, num_hidden_layers=3, hidden_size=128, head_dim=16)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave every layer to the other processes."""
    monkeypatch.setattr(LayerJob, "results", _nothing)


def _nothing(*_: Any) -> Iterator[Any]:
    yield from ()


class Killing:
    """A connection that kills the process at its other end after the first layer."""

    def __init__(self, connection: Any, helper: Any) -> None:
        self.connection, self.helper, self.received = connection, helper, 0

    def recv(self) -> Any:
        if self.received:  # a message is larger than a pipe holds, so the process has not sent its last one
            self.helper.kill()
            self.helper.join()
        self.received += 1
        return self.connection.recv()


def test_another_process_gives_the_same_bytes_and_may_be_killed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "1" / "out", tmp_path / "2" / "out"
    convert_model(model, one, device="cpu", **OPTIONS)
    receive = spread._receive
    with monkeypatch.context() as patch:
        patch.setattr(LayerJob, "results", _nothing)
        patch.setattr(spread, "_receive", lambda c, helper, to: receive(Killing(c, helper), helper, to))  # type: ignore[arg-type]
        with pytest.raises(HeadwiseError, match="process of cpu ended too early, with exit code -9") as caught:
            convert_model(model, two, device="cpu,cpu", **OPTIONS)
    assert caught.value.keeps_work and "`resume`" in str(caught.value)
    assert not two.exists() and not multiprocessing.active_children()
    journal = (two.parent / ".out.headwise-work" / "journal.jsonl").read_text()
    assert '"layer 0"' in journal and '"layer 2"' not in journal
    convert_model(model, two, device="cpu", resume=True, **OPTIONS)
    assert contents(two) == contents(one)


def test_records_are_equal_with_checks_losses_and_damage(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is the same, also the record with the damage of each layer, whichever process estimates it."""
    monkeypatch.setattr("headwise.convert.calibration.corpus.LOSS_SECONDS", 60.0)
    options = {**OPTIONS, "refit": "off", "verify": True}
    one, two = tmp_path / "1" / "out", tmp_path / "2" / "out"
    convert_model(model, one, device="cpu", **options)
    with monkeypatch.context() as patch:
        patch.setattr(LayerJob, "results", _nothing)
        patch.setattr(LayerDamage, "results", _nothing)
        convert_model(model, two, device="cpu,cpu", **options)
    assert all(layer["damage"] > 0 for layer in json.loads((one / "headwise.json").read_text())["layers"].values())
    assert contents(two) == contents(one)


def test_other_processes_work_before_results_are_read() -> None:
    """This process is busy with other work meanwhile, and finds every item done."""
    with DevicePool([CPU, CPU]) as pool:
        for items in ([3, 5, 6], [], [2]):
            running = pool.begin(Squares(), items)
            while pool._counter.value <= len(items):  # the other process has drawn past the last item
                time.sleep(0.01)
            assert list(running) == [(item, item**2) for item in items]
        assert list(pool.begin(Squares(), [1, 4], processes=1)) == [(1, 1), (4, 16)]
        with pytest.raises(ZeroDivisionError):
            list(pool.begin(Inverses(), [0]))


class Squares:
    """Squares of the items."""

    def results(self, items: Iterable[int], *_: Any) -> Iterator[tuple[int, int]]:
        """Yield an item and its square."""
        yield from ((item, item**2) for item in items)


class Inverses(Squares):
    """Inverses of the items."""

    def results(self, items: Iterable[int], *_: Any) -> Iterator[Any]:
        """Yield the inverses."""
        yield from (1 / item for item in items)


@pytest.mark.full
@pytest.mark.parametrize("to", [{"groups": 1}, {"to": "mla", "groups": None, "rank": 24, "rope_dim": 4}], ids=str)
def test_any_number_of_devices_gives_the_same_bytes(model: Path, tmp_path: Path, idle: None, to: Any) -> None:
    outs = [tmp_path / str(count) / "out" for count in (1, 2, 4)]
    for out, devices in zip(outs[1:], ("cpu,cpu", "cpu,cpu,cpu,cpu"), strict=True):
        convert_model(model, out, device=devices, **{**OPTIONS, **to})
    assert contents(outs[1]) == contents(outs[2])


@pytest.mark.full
def test_the_error_of_another_process_is_that_of_one(model: Path, tmp_path: Path, idle: None) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    options = {**OPTIONS, "calibrate": "none", "calibration_tokens": None, "refit": "off"}
    with pytest.raises(HeadwiseError, match=r"k_proj\.weight holds NaN") as caught:
        convert_model(broken, tmp_path / "out", device="cpu,cpu", **options)
    assert caught.value.hint and "`allow_nan`" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_weights_in_memory_take_one_device(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(model / "model.safetensors"), tmp_path / "pytorch_model.bin")
    options = {**OPTIONS, "allow_pickle": True, "dry_run": True}
    assert isinstance(convert_model(tmp_path, tmp_path / "out", device="cpu", **options), Plan)
    with pytest.raises(SettingError, match=r"`device` names 2 devices; \.bin weights"):
        convert_model(tmp_path, tmp_path / "out", device="cpu,cpu", **options)


class Together:
    """Work in which the second place fails, and the first one then loses it."""

    def results(self, items: Iterable[int], device: torch.device, progress: Any) -> Iterator[Any]:
        for place in items:
            raise HeadwiseError("The second is out of memory.") if place else RuntimeError("Connection closed.")
        yield None


def test_the_first_reason_is_raised_where_processes_work_together() -> None:
    with DevicePool([CPU, CPU]) as pool:
        assert sorted(pool.begin(Squares(), [3, 5], together=True)) == [(3, 9), (5, 25)]
        with pytest.raises(HeadwiseError, match="The second is out of memory"):
            list(pool.begin(Together(), range(2), together=True))


def test_the_plan_names_the_devices(model: Path, tmp_path: Path) -> None:
    plans = [convert_model(model, tmp_path, device=d, dry_run=True, **OPTIONS) for d in ("cpu", "cpu,cpu")]
    one, two = (plan for plan in plans if isinstance(plan, Plan))
    assert "Layers are converted, and their damage is estimated, on cpu, cpu." in two.notes
    assert two.seconds["refit"] <= one.seconds["refit"] and two.peak_memory == 2 * one.peak_memory
    assert two.arguments == one.arguments


@pytest.mark.parametrize("error", [HeadwiseError("No.", "Do."), SettingError("rank", "`rank` is 0.", "Do.")])
def test_an_error_crosses_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
