"""Tensors stored times powers of two: no digit changes, and a reader sees them in their natural size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwise.errors import HeadwiseError
from headwise.io.quantized.powers import MAX_EXPONENT, POWERS, as_stored, exponent_of, is_exact, powers_of
from headwise.io.reader import make_buffers, open_checkpoint
from headwise.io.writer import OutputTensor, Writer

NORM, OTHER = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
EXPONENTS = {"input_layernorm": -13}


def write(folder: Path, tensors: dict[str, torch.Tensor], powers: Any = EXPONENTS) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", POWERS: powers}))
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reader_takes_the_power_back_in_every_way_of_reading(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    natural = {NORM: (1 + torch.rand(37)).to(dtype), OTHER: torch.randn(5, 37).to(dtype)}
    folder = write(tmp_path / "model", {**natural, NORM: natural[NORM] * 2.0**-13})
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.is_plain and checkpoint.powers == EXPONENTS and POWERS not in checkpoint.config
    for name, values in natural.items():
        chunks = [chunk.clone() for chunk in checkpoint.chunks(name, make_buffers(2))]
        assert torch.equal(checkpoint.read(name), values)
        assert torch.equal(torch.cat(chunks).view(dtype).view(values.shape), values)
    stored = checkpoint.read_stored(checkpoint.tensors[NORM])
    assert torch.equal(stored, natural[NORM] * 2.0**-13)

    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, POWERS: {"input_layernorm": -12}}))
    assert open_checkpoint(folder).fingerprint() != checkpoint.fingerprint()


def test_a_writer_stores_the_power_of_what_it_writes_copies_and_writes_again(tmp_path: Path) -> None:
    natural = {NORM: torch.rand(37) + 1, OTHER: torch.rand(37) + 1, "a.q_proj.weight": torch.rand(3, 37)}
    source = open_checkpoint(write(tmp_path / "source", natural, {}))
    outputs = [
        OutputTensor(NORM, torch.float32, (37,), NORM, exponent=-13),
        OutputTensor(OTHER, torch.float32, (37,), exponent=-13),
        OutputTensor("a.q_proj.weight", torch.float32, (3, 37), exponent=13),
    ]
    with Writer(tmp_path / "out", outputs, identity={}) as writer:
        writer.copy(NORM, source)
        writer.write_chunks(OTHER, natural[OTHER].split(5))
        writer.write("a.q_proj.weight", torch.zeros(3, 37))
        writer.rewrite("a.q_proj.weight", natural["a.q_proj.weight"])
        writer.add_text("config.json", json.dumps({"model_type": "llama"}))
        out = writer.publish()
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[t.name], natural[t.name] * 2.0**t.exponent) for t in outputs)


def test_what_cannot_be_stored_exactly_is_refused() -> None:
    small, large = torch.tensor([1.0, 1e-38]), torch.tensor([1.0, 1e38])
    for values, exponent in ((small, -13), (large, 13)):
        with pytest.raises(
            HeadwiseError, match=rf"a.weight cannot be stored times 2\^{exponent} exactly in float32"
        ):
            as_stored("a.weight", values, exponent)
        assert not is_exact(values, exponent)
    assert torch.equal(as_stored("a.weight", small, 13), small * 2.0**13)
    assert is_exact(small, 13) and is_exact(small, 0) and is_exact(torch.tensor([0.0, torch.nan]), -13)


@pytest.mark.parametrize(
    "entry", [[1], "13", {"a": 0.5}, {"a": True}, {"a": MAX_EXPONENT + 1}, {"a": {"b": 1}}, {"a": None}]
)
def test_an_entry_that_is_no_table_of_exponents_is_refused(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="which is no table of names and exponents up to 64"):
        open_checkpoint(write(tmp_path / "model", {NORM: torch.ones(3)}, entry))


def test_a_module_is_named_by_the_last_part_of_its_name() -> None:
    powers = powers_of({POWERS: {"q_proj": 3}})
    names = ("model.layers.11.self_attn.q_proj.weight", "a.q_proj.bias", "a.q_proj_b.weight", "q_proj", "weight")
    assert [exponent_of(name, powers) for name in names] == [3, 0, 0, 0, 0]
    assert powers_of({}) == {} == powers_of({POWERS: None})
