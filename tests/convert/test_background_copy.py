"""What is not converted is copied beside other work, and an error is raised where the copy is waited for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwise.convert.background_copy import BackgroundCopy
from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.io.writer import OutputTensor, Writer
from headwise.models.mla_source import ScaledCopy
from headwise.progress import SILENT


def source_of(folder: Path, **tensors: torch.Tensor) -> Any:
    """Save a checkpoint of these tensors, and open it."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return open_checkpoint(folder)


def target_of(checkpoint: Any, *converted: str) -> Any:
    """Return a target that converts some tensors, doubles `computed` and `scaled`, and copies the others."""
    outputs = [
        OutputTensor(name, each.dtype, each.shape, source=None if name in ("computed", "scaled") else name)
        for name, each in checkpoint.tensors.items()
    ]
    return SimpleNamespace(
        layouts=[None],
        outputs=outputs,
        converted_names=lambda _: list(converted),
        scaled={"scaled": ScaledCopy("scaled", "scaled", 2.0)},
        transform_other=lambda name, source: 2 * source.read(name),
    )


def test_layers_are_written_beside_the_copy(tmp_path: Path) -> None:
    given = {name: torch.randn(31, 7) for name in ("computed", "first", "layer", "scaled", "second")}
    checkpoint = source_of(tmp_path / "in", **given)
    target = target_of(checkpoint, "layer")
    with (
        Writer(tmp_path / "out", target.outputs, identity={}) as writer,
        BackgroundCopy(checkpoint, target, writer) as copy,
    ):
        copy._thread.submit(int).result()  # what the thread copies is written before a layer is
        assert writer.done == {"first", "scaled", "second"}
        writer.write("layer", -given["layer"])
        copy.finish(SILENT)
        writer.publish()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["layer"], -given["layer"])
    assert all(torch.equal(written[name], 2 * given[name]) for name in ("computed", "scaled"))
    assert all(torch.equal(written[name], given[name]) for name in ("first", "second"))


def test_an_error_of_the_copy_names_the_tensor(tmp_path: Path) -> None:
    checkpoint = source_of(tmp_path / "in", bad=torch.full((3,), torch.nan), layer=torch.ones(5))
    target = target_of(checkpoint, "layer")
    with (
        Writer(tmp_path / "out", target.outputs, identity={}) as writer,
        BackgroundCopy(checkpoint, target, writer) as copy,
    ):
        writer.write("layer", torch.ones(5))
        with pytest.raises(HeadwiseError, match="Tensor bad holds NaN"):
            copy.finish(SILENT)
