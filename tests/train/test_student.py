"""What is trained becomes what is written: same function before and after the export, whatever was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.io.reader import open_checkpoint
from headwise.measure.loss import nats_per_token
from headwise.recipes.outcome import write_stock_model
from headwise.train.settings import Lora, Training
from headwise.train.student import ModelFolder, Student, _merge_adapters
from headwise.train.teacher import forward_with_hooks
from tests.small_parents import converted, parent

MLA = {"to": "mla", "rank": 12, "rope_dim": 4}
BLOCKS = torch.randint(0, 2048, (4, 32), generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> ModelFolder:
    return ModelFolder.of(open_checkpoint(folder))


def disturb(student: Student) -> None:
    """Move every trained parameter as far as a short training might."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in student.trained_parameters().values():
            p.add_(0.05 * p.std().nan_to_num(0.01) * torch.randn_like(p))


def nats(network: Any) -> float:
    return nats_per_token(network, BLOCKS).nats


@pytest.mark.parametrize(
    ("kind", "fields", "target"),
    [
        ("llama", {}, {"to": "mqa"}),
        pytest.param("llama", {"tie_word_embeddings": True}, MLA, marks=pytest.mark.full),
        ("llama", {"attention_bias": True}, MLA),
        pytest.param("qwen2", {"num_key_value_heads": 2}, MLA | {"pad_values": True}, marks=pytest.mark.full),
        ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}, {"to": "mqa"}),
    ],
    ids=["mqa", "mla tied", "mla with biases", "mla padded", "fused"],
)
def test_the_loss_is_the_same_before_and_after_the_export(
    tmp_path: Path, kind: str, fields: dict[str, Any], target: dict[str, Any]
) -> None:
    home = parent(tmp_path / "parent", kind, **fields)
    folder = opened(converted(home, tmp_path / "child", **target))
    student = Student.load(folder, opened(home))
    student.select_parameters(None)
    # Untouched, it is the folder's own function.
    assert nats(student.network) == pytest.approx(nats(folder.load(torch.float32)), abs=1e-5)
    before = nats(student.network)
    disturb(student)
    assert abs(nats(student.network) - before) > 1e-3
    write_stock_model(student, student.network.state_dict(), tmp_path / "written")
    written = opened(tmp_path / "written")
    assert {n: (e.shape, e.dtype) for n, e in written.checkpoint.tensors.items()} == {
        n: (e.shape, e.dtype) for n, e in folder.checkpoint.tensors.items()
    }
    assert nats(written.load(torch.float32)) == pytest.approx(nats(student.network), abs=1e-5)


@pytest.mark.parametrize("target", [pytest.param({"to": "mqa"}, marks=pytest.mark.full), MLA], ids=["mqa", "mla"])
def test_adapters_are_merged(tmp_path: Path, target: dict[str, Any]) -> None:
    folder = opened(converted(parent(tmp_path / "parent"), tmp_path / "child", **target))
    student = Student.load(folder)
    student.select_parameters(Training(tokens=1, parameters="attention", lora=Lora(rank=2, alpha=8)))
    assert all(".lora_" in name for name in student.trained_parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.trained_parameters().values():
            p.normal_(0, 0.05)
    student.network.eval()
    write_stock_model(student, student.network.state_dict(), tmp_path / "written")
    assert nats(opened(tmp_path / "written").load(torch.float32)) == pytest.approx(nats(student.network), abs=1e-5)
    # The projections that peft's own merge gives.
    exported = _merge_adapters(student.network.state_dict(), student.lora)
    merged = student.network.merge_and_unload().state_dict()
    assert exported.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=1e-7)


def test_only_attention_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    folder = opened(converted(parent(tmp_path / "parent"), tmp_path / "child", **MLA))
    student = Student.load(folder)
    student.select_parameters(Training(tokens=1, parameters="attention"))
    disturb(student)
    write_stock_model(student, student.network.state_dict(), tmp_path / "written")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("child", "written"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".self_attn." in name for name in changed)
    untouched = {name for name in before if ".self_attn." in name} - changed
    assert all("layernorm" in name for name in untouched)  # the latent's norm is a constant of the format


@pytest.mark.parametrize("known", [True, False])
def test_scales_make_an_exact_lift_agree_inside_too(tmp_path: Path, known: bool) -> None:
    home = parent(tmp_path / "parent")
    folder, teacher = opened(converted(home, tmp_path / "child", to="mla", exact=True)), opened(home)
    student = Student.load(folder, teacher if known else None)
    hidden, attention = student.scales(teacher)
    assert hidden == attention == pytest.approx(1.0 if known else (1e-6 / 1e-5) ** 0.5)
    if known:  # what is trained is as large as it was in the parent
        ours, theirs = (m.model.embed_tokens.weight for m in (student.network, teacher.load(torch.float32)))
        torch.testing.assert_close(ours, theirs)

    def outputs(network: Any, paths: list[str]) -> Any:
        modules = [network.get_submodule(path) for path in paths]
        with torch.no_grad():
            return forward_with_hooks(network, {"input_ids": BLOCKS}, hidden_states=True, attention=modules)

    ours = outputs(student.network, student.attention_paths)
    theirs = outputs(teacher.load(torch.float32), [*teacher.attention_paths.values()])
    assert len(ours.hidden_states) == 1 and len(ours.attention_outputs) == 2
    for scale, name in ((hidden, "hidden_states"), (attention, "attention_outputs")):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a / scale, b, rtol=1e-3, atol=1e-4)


def test_a_tensor_that_nobody_knows_is_not_lost_in_silence(tmp_path: Path) -> None:
    folder = opened(parent(tmp_path / "parent"))
    student = Student.load(folder)
    state: dict[str, Tensor] = {**student.network.state_dict(), "model.new.weight": torch.zeros(1)}
    with pytest.raises(Exception, match=r"no tensor model\.new\.weight"):
        list(student.export(state))


def test_what_the_model_does_not_read_is_kept(tmp_path: Path) -> None:
    home = parent(tmp_path / "parent")
    tensors = load_file(home / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, home / "model.safetensors", metadata={"format": "pt"})
    student = Student.load(opened(home))
    write_stock_model(student, student.network.state_dict(), tmp_path / "written")
    assert load_file(tmp_path / "written" / "model.safetensors").keys() == tensors.keys()
