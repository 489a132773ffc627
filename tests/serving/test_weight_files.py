"""The bytes of weights: of a quantised model as its files store them, of its conversions as they write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from headwise.convert.inspect import Inspection, inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.plan import Plan
from headwise.io.gguf import open_gguf
from tests import tiny_models
from tests.convert.test_encode import save_gpt_oss
from tests.io.gguf_files import write_gguf
from tests.io.quantized.packed import METHODS, save_quantised


def weights(inspection: Inspection) -> dict[str, int | None]:
    """Bytes of the weights on each GPU, by layout."""
    rows = {option.name: option.serving for option in inspection.options} | {"unchanged": inspection.serving}
    return {name: serving.weight_bytes for name, serving in rows.items() if serving is not None}


def in_files(folder: Path) -> int:
    tensors = load_file(folder / "model.safetensors").items()
    return sum(tensor.nbytes for name, tensor in tensors if not name.endswith("weight_format"))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_quantised_model_counts_what_its_files_store(method: str, tmp_path: Path) -> None:
    save_quantised(tmp_path / "model", method)
    found = inspect_model(tmp_path / "model", tp=1)
    rows = weights(found)
    stored = in_files(tmp_path / "model")
    assert rows["unchanged"] == stored
    plan = convert_model(tmp_path / "model", tmp_path / "out", to="mqa", dry_run=True)
    assert isinstance(plan, Plan) and rows["MQA"] == plan.bytes_after > stored
    divided = weights(inspect_model(tmp_path / "model", tp=2))["unchanged"]
    assert divided == pytest.approx(stored / 2, rel=0.01)
    named = METHODS[method][1]["quant_method"]
    for verdict in found.engines:
        known = verdict.name == "transformers" and named == "fp8"
        assert verdict.verdict == ("loads" if known else "unknown") and named in verdict.reason
        assert not verdict.commands
    assert {v.name: v.verdict for v in found.options[0].engines}["vllm"] == "loads"
    assert any(f"quantised ({named})" in note and "as its files store" in note for note in found.notes)


def test_experts_that_are_carried_over_count_as_they_are_stored(tmp_path: Path) -> None:
    source = save_gpt_oss(tmp_path / "model")
    rows = weights(inspect_model(source, tp=1))
    plan = convert_model(source, tmp_path / "out", to="mqa", dry_run=True)
    assert isinstance(plan, Plan)
    assert rows["unchanged"] == in_files(source)
    options = {option.name: option.engines for option in inspect_model(source).options}
    assert options["MQA"] == plan.engines and "mxfp4" in options["MQA"][0].reason
    assert rows["MQA"] == pytest.approx(plan.bytes_after, rel=0.01)  # biases of heads that go are not counted
    found = inspect_model(source, card="h100").serving
    assert found and found.cache_bytes and found.weight_bytes and found.seconds_for_one
    stored = load_file(source / "model.safetensors").items()
    experts = sum(tensor.nbytes for name, tensor in stored if ".experts." in name)
    read = found.weight_bytes - experts / 2 + found.cache_bytes
    assert found.seconds_for_one == pytest.approx(read / 3.35e12)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_without_headers_the_index_or_nothing_is_known(method: str, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model", torch.bfloat16)
    plain = weights(inspect_model(source, tp=1))
    (source / "model.safetensors").unlink()
    config = tiny_models.read_config(source) | {"quantization_config": {"quant_method": method}}
    (source / "config.json").write_text(json.dumps(config))
    found = inspect_model(source, tp=1)
    assert found.parameters_from == "config" and weights(found)["unchanged"] is None
    assert any(f"quantised ({method})" in note and "no headers" in note for note in found.notes)
    # What is carried over as it is stored has no known size either.
    assert weights(found)["MQA"] == (plain["MQA"] if method == "fp8" else None)
    index = {"metadata": {"total_size": 12_345}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights(inspect_model(source, tp=1))["unchanged"] == pytest.approx(12_345, abs=2)
    for odd in (-1, 0, True, "12", 10**400):
        index["metadata"]["total_size"] = odd  # type: ignore[index]
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        assert weights(inspect_model(source, tp=1))["unchanged"] is None


def test_a_gguf_file_counts_its_blocks(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", Kind.Q8_0)
    found = inspect_model(path, tp=1)
    assert weights(found)["unchanged"] == sum(tensor.nbytes for tensor in open_gguf(path).tensors.values())
    verdicts = {verdict.name: verdict for verdict in found.engines}
    assert verdicts["vllm"].verdict == verdicts["llama.cpp"].verdict == "unknown"
    assert verdicts["transformers"].verdict == "loads" and "gguf_file" in verdicts["transformers"].reason
    assert not any(verdict.commands for verdict in found.engines)
    assert any("quantised (gguf)" in note for note in found.notes)
    plain = inspect_model(write_gguf(tmp_path / "f.gguf", "llama", Kind.BF16), tp=1)
    assert not any("quantised" in note for note in plain.notes)
