"""The same input, options and versions give the same bytes, interrupted or not; on more threads, to rounding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert import pipeline
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError
from headwise.records.manifest import RECORD
from tests.convert.speaking import TEXT, save_speaking
from tests.faults.harness import contents

# Large enough that torch and the linear algebra behind it split their work between two threads.
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 32, "max_position_embeddings": 128}
KINDS: dict[str, dict[str, Any]] = {
    "optimal": {"to": "gqa", "groups": 2, "refit": "off"},
    "refit": {"to": "gqa", "groups": 2, "refit": 3},
    "mla": {"to": "mla", "rank": 48, "rope_dim": 16, "refit": "off"},
    "mla, refit": {"to": "mla", "rank": 48, "rope_dim": 16, "refit": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking(tmp_path_factory.mktemp("parent") / "model", **WIDE)


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_interruptions_leave_no_trace(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = {**TEXT, "calibration_tokens": 2048, "verify": False, **KINDS[kind]}
    two, one = (on_threads(threads, model, tmp_path, options) for threads in (2, 1))
    # Threads compute the sums of matrix products in another order.
    apart = apart_by(one / "model.safetensors", two / "model.safetensors")
    # The text has 58 distinct bytes, so the inputs of layer 0 have rank 58 of 256, and several latents and output
    # matrices have the least error: rounding decides which one is found. Their errors are equal.
    apart = {name: x for name, x in apart.items() if ".layers.0.self_attn." not in name}
    first = [layer_errors(folder, "0") for folder in (one, two)]
    assert first[0] == pytest.approx(first[1], rel=1e-3)
    print(f"{kind}: {sum(x > 0 for x in apart.values())} tensors differ, by {max(apart.values()):.1e} at most")
    assert max(apart.values()) < 1e-4

    real = pipeline.Writer.note

    def stop(self: Any, key: str, value: Any) -> None:
        if key == "layer 1":
            raise KeyboardInterrupt
        real(self, key, value)

    out = tmp_path / "resumed" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Writer, "note", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_model(model, out, **options)
    convert_model(model, out, resume=True, **options)
    assert contents(out) == contents(one)


def test_without_a_calibration_any_threads_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    options = {"to": "gqa", "groups": 2, "method": "mean", "calibrate": "none", "verify": False}
    two, one = (on_threads(threads, model, tmp_path, options) for threads in (2, 1))
    assert contents(one) == contents(two)


def apart_by(one: Path, two: Path) -> dict[str, float]:
    """Return the largest difference in each tensor of two files, relative to its largest number."""
    other = load_file(two)
    return {name: float((t - other[name]).abs().max() / t.abs().max()) for name, t in load_file(one).items()}


def layer_errors(folder: Path, layer: str) -> list[float]:
    """Return the recorded errors of a layer: of its keys, and of its output after the solution."""
    report = json.loads((folder / RECORD).read_text())["layers"][layer]
    return [report["key_error"], report["output"]["after"]]


def on_threads(threads: int, model: Path, home: Path, options: dict[str, Any]) -> Path:
    torch.set_num_threads(threads)
    out = home / str(threads) / "out"
    convert_model(model, out, **options)
    return out


def test_hashes_tell_what_changed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_model(model, out, to="gqa", groups=2, calibrate="none")
    found = verify_model(out, hashes=True)
    assert found.passed and len(found.checks) == 1
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    (out / "tokenizer.json").write_text("{}")
    found = verify_model(out, hashes=True)
    assert not found.passed and "tokenizer.json (2 in all)" in found.failures
    (out / RECORD).unlink()
    with pytest.raises(HeadwiseError, match=r"has no headwise\.json"):
        verify_model(out, hashes=True)
