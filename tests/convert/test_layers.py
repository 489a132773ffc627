"""Where layers are converted, and conversions of the embedded model on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.layers import LayerResult, RemainingLayers, choose_device
from headwise.convert.pipeline import convert_model
from headwise.io.reader import Checkpoint
from headwise.io.source import EMBEDDED_MODEL
from tests.convert.devices import needs_gpu
from tests.convert.speaking import TEXT, save_speaking


@pytest.mark.parametrize(
    ("device", "measured", "calibrated", "exact", "wanted"),
    [
        ("cuda:1", True, True, False, "cuda:1"),
        ("cuda:1", False, True, False, "cuda:1"),
        ("cuda:1", False, True, True, "cpu"),
        ("cuda:1", False, False, False, "cpu"),
        ("mps", False, True, False, "cpu"),  # has no float64
    ],
)
def test_where_layers_are_converted(
    device: str, measured: bool, calibrated: bool, exact: bool, wanted: str
) -> None:
    target: Any = SimpleNamespace(calibrated=calibrated, exact=exact)
    calibration = CalibrationPlan("builtin", 2, 32, 0, 0) if measured else None
    assert choose_device(target, calibration, torch.device(device)) == torch.device(wanted)


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 131)[None] % model.config.vocab_size).logits


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("to", [{"to": "mla", "rank": 48, "rope_dim": 16}, {"to": "gqa", "groups": 1}], ids=str)
def test_the_demo_model_becomes_the_same_on_a_gpu(to: dict[str, Any], tmp_path: Path) -> None:
    """Without text, from text to fitted output matrices and a refit, and by moments that the CPU took."""
    text = {"calibration_tokens": 8192, "refit": "off"}
    ways: dict[str, tuple[dict[str, Any], float]] = {
        "blind": ({"calibrate": "none"}, 1e-5),
        "text": (text, 1e-3),
        "refit": ({**text, "refit": 3}, 5e-2),  # where a gradient is next to nothing, rounding turns Adam's step
        "moments": ({"moments": tmp_path / "moments", "refit": "off"}, 1e-5),
    }
    convert_model(
        EMBEDDED_MODEL,
        tmp_path / "taken",
        **to,
        **text,
        save_moments=tmp_path / "moments",
        device="cpu",
        verify=False,
    )
    for way, (options, close) in ways.items():
        for device in ("cpu", "cuda"):
            out = tmp_path / f"{way}-{device}"
            convert_model(EMBEDDED_MODEL, out, **to, **options, dtype="float32", device=device, verify=False)
        ours, theirs = (logits(tmp_path / f"{way}-{device}") for device in ("cuda", "cpu"))
        assert float((ours - theirs).norm() / theirs.norm()) < close, way


@pytest.mark.parametrize("to", [{"to": "mla", "rank": 16, "rope_dim": 8}, {"to": "gqa", "groups": 2}], ids=str)
def test_the_weights_of_a_layer_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: dict[str, Any]
) -> None:
    """The layer that runs on text and the layer that is converted are the same tensors."""
    read: list[str] = []
    reading = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), reading(self, name))[1])
    parent = save_speaking(tmp_path / "parent")
    convert_model(parent, tmp_path / "out", **to, **TEXT, refit="off", verify=False, device="cpu")
    counts = Counter(name for name in read if ".self_attn." in name)
    assert len(counts) == 2 * 4 and set(counts.values()) == {1}


class Slow:
    """A writer that takes until `free` is set."""

    def __init__(self) -> None:
        self.notes: dict[str, Any] = {}
        self.done: set[str] = set()
        self.free = Event()

    def note(self, key: str, value: Any) -> None:
        self.notes[key] = value

    def write(self, name: str, tensor: Tensor) -> None:
        assert self.free.wait(60)
        if name == "bad":
            raise OSError("full")
        self.done.add(name)


@pytest.mark.parametrize("beside", [False, True])
def test_a_layer_is_written_beside_the_next_one_if_asked(beside: bool) -> None:
    target, writer = SimpleNamespace(layouts=[0, 1, 2], converted_names=lambda i: (str(i),)), Slow()
    before: list[set[str]] = []

    def convert() -> Iterator[LayerResult]:
        for layer in range(3):
            before.append(set(writer.done))
            if layer or not beside:
                writer.free.set()  # a writer that is waited for would never be done
            yield LayerResult(layer, {str(layer): torch.ones(1)}, {"error": 0.5})

    remaining = RemainingLayers(cast(Any, target), cast(Any, writer))
    assert remaining.write(convert(), beside=beside) == {key: {"error": 0.5} for key in range(3)}
    assert writer.done == {"0", "1", "2"} and writer.notes["layer 2"] == {"error": 0.5}
    assert before[1] == (set() if beside else {"0"})


@pytest.mark.parametrize("beside", [False, True])
def test_a_layer_that_cannot_be_written_is_an_error(beside: bool) -> None:
    target, writer = SimpleNamespace(layouts=[0], converted_names=lambda _: ("bad",)), Slow()
    writer.free.set()
    remaining = RemainingLayers(cast(Any, target), cast(Any, writer))
    with pytest.raises(OSError, match="full"):
        remaining.write([LayerResult(0, {"bad": torch.ones(1)}, {})], beside=beside)
