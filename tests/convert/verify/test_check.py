"""What verify proves of a sound folder, and that it sees each way in which one can be unsound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from headwise.convert.calibration.layer_stream import LayerStream
from headwise.convert.pipeline import convert_model
from headwise.convert.verify import check
from headwise.convert.verify.check import Verification, check_folder, verify_model
from headwise.convert.verify.verification import CHECKS
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import open_checkpoint
from headwise.models.stock_match import match_source
from headwise.progress import Progress
from tests import tiny_models
from tests.convert.devices import needs_gpu
from tests.convert.speaking import save_speaking

Tensors = dict[str, Tensor]
ATTENTION = "model.layers.1.self_attn."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, and its conversions: to two key-value heads, and to as many as query heads."""
    home = tmp_path_factory.mktemp("verify")
    parent = save_speaking(home / "parent", num_key_value_heads=4)
    convert_model(parent, home / "gqa", to="gqa", groups=2, calibrate="none", verify=False)
    convert_model(parent, home / "mha", to="mha", verify=False)
    convert_model(parent, home / "long", context=64, rope="ntk", verify=False)
    convert_model(parent, home / "long-mla", to="mla", exact=True, context=64, rope="yarn", verify=False)
    return home


def failed(found: Verification) -> set[str]:
    assert found.passed == (not found.failures)
    return {name for name, passed, _ in found.checks if not passed}


@pytest.mark.parametrize("kind", ["gqa", "mha", "long", "long-mla"])
def test_a_sound_folder_passes_every_check(home: Path, kind: str) -> None:
    found = verify_model(home / kind, home / "parent")
    assert found.passed, found.failures
    names = [name for name, _, _ in found.checks]
    assert names == ["tensors", "layout", "cache", "finite", "record", "function", "parent", "loading"]
    # Every check of a new folder can be accepted by its name; `finite` and `record` check older folders.
    # Only folders with indexers have a check of what they select.
    expected = [name for name in CHECKS if name != "selection"]
    assert [name for name in names if name not in ("finite", "record")] == expected
    assert verify_model(home / kind).passed
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


def details(found: Verification) -> dict[str, str]:
    return {name: detail for name, _, detail in found.checks}


@pytest.mark.parametrize("arguments", [{"to": "mla", "exact": True}, {"to": "mha"}])
def test_an_exact_conversion_without_its_windows_has_the_logits_of_the_parent_without_them(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    parent = tiny_models.save("mistral", tmp_path / "parent")
    convert_model(parent, tmp_path / "out", sliding_window=0, context=4096, rope="yarn", **arguments)
    found = verify_model(tmp_path / "out", parent)
    assert found.passed, found.failures
    assert "logits of the whole model" in details(found)["parent"]


def test_other_positions_than_those_of_the_record_are_not_the_parents(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "long-mla", tmp_path / "out")
    record = json.loads((folder / "headwise.json").read_text())
    for change, words in (
        ({"rope": "linear"}, "attention of all layers"),
        ({"context": 128}, "max_position_embeddings"),
    ):
        changed = record | {"arguments": record["arguments"] | change}
        (folder / "headwise.json").write_text(json.dumps(changed))
        found = verify_model(folder, home / "parent")
        assert failed(found) == {"parent"} and words in details(found)["parent"]


@pytest.mark.parametrize("arguments", [{"to": "gqa", "groups": 2}, {"to": "mla", "rank": 8, "rope_dim": 4}])
def test_the_loaded_model_has_the_logits_of_its_weights_in_float64(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    convert_model(home / "parent", tmp_path / "out", calibrate="none", verify=False, **arguments)
    found = verify_model(tmp_path / "out")
    assert found.passed and "float64 evaluation" in details(found)["loading"]
    real = torch.nn.functional.scaled_dot_product_attention

    def wrong_in_float32(query: Tensor, *given: Any, **more: Any) -> Tensor:
        return real(query * 1.1 if query.dtype == torch.float32 else query, *given, **more)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", wrong_in_float32)
    assert failed(verify_model(tmp_path / "out")) == {"loading"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_change_of_the_dtype_alone_is_exact(home: Path, tmp_path: Path, dtype: str) -> None:
    convert_model(home / "parent", tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = f"{ATTENTION}q_proj.weight"
    tensors[name] = tensors[name].roll(1, 0)
    assert verify_model(tmp_path / "out", home / "parent").passed
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out" / "headwise.json").unlink()
    assert "parent" in failed(verify_model(tmp_path / "out", home / "parent"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 100_000, "num_return_sequences": 2, "do_sample": True},
        {"use_cache": False, "stop_strings": ["<end>"]},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
)
def test_the_generation_settings_of_a_folder_are_not_used(
    home: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = shutil.copytree(home / "mha", tmp_path / "mha")
    (folder / "headwise.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(settings))
    found = verify_model(folder, home / "parent")
    assert found.passed, found.failures


@pytest.mark.parametrize("kind", ["mha", "mla", "long", "bf16"])
def test_large_models_compare_their_logits_layer_by_layer(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    arguments = {
        "mha": {"to": "mha"},
        "mla": {"to": "mla", "exact": True},
        "long": {"context": 64, "rope": "ntk"},
        "bf16": {"dtype": "bfloat16"},
    }
    out = tmp_path / "out"
    convert_model(home / "parent", out, verify=False, **arguments[kind])
    monkeypatch.setattr("headwise.convert.verify.check.WHOLE_BYTES", 0)
    monkeypatch.setattr("headwise.convert.verify.whole_model.WHOLE_BYTES", 0)
    found = verify_model(out, home / "parent")
    assert found.passed, found.failures
    assert "logits of the whole model" in dict((name, detail) for name, _, detail in found.checks)["parent"]


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_pass_every_check(home: Path, tmp_path: Path, rule: str) -> None:
    convert_model(home / "parent", tmp_path / "long", context=64, rope=rule)
    convert_model(tmp_path / "long", tmp_path / "mha", to="mha")
    assert verify_model(tmp_path / "mha", tmp_path / "long").passed


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("gqa", {"to": "gqa", "groups": 4}),
        ("gqa", {"to": "mqa"}),
        ("gqa", {"to": "mha"}),
        ("gqa", {"to": "mla", "rank": 8, "rope_dim": 4}),
        ("mha", {"to": "gqa", "groups": 2}),
    ],
)
def test_a_folder_that_is_not_what_its_record_says_fails(
    home: Path, tmp_path: Path, kind: str, arguments: dict[str, Any]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(home / kind, folder)
    record = json.loads((folder / "headwise.json").read_text())
    record["arguments"] = arguments
    (folder / "headwise.json").write_text(json.dumps(record))
    assert failed(verify_model(folder)) == {"layout"}


def test_a_stock_model_passes_without_a_record(home: Path) -> None:
    found = verify_model(home / "parent")
    assert found.passed and "record" not in {name for name, _, _ in found.checks}


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl", "olmo2", "phi3", "cohere2"])
def test_nested_fused_and_normed_folders_pass(tmp_path: Path, model_type: str) -> None:
    parent = tiny_models.save(model_type, tmp_path / "parent", torch.bfloat16)
    convert_model(parent, tmp_path / "out", to="mqa", calibrate="none")
    found = verify_model(tmp_path / "out", parent)
    assert found.passed, found.failures


def swap_query_heads(tensors: Tensors) -> None:
    weight = tensors[ATTENTION + "q_proj.weight"].view(8, 8, -1)
    weight[[0, 7]] = weight[[7, 0]]


def drop(tensors: Tensors) -> None:
    del tensors[ATTENTION + "v_proj.weight"]


def add(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.x_proj.weight"] = torch.zeros(2)


def untie(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def spoil(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")


def narrow(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()


def nudge(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[0] += 0.01

    change.__name__ = name
    return change


MLP, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("kind", "change", "checks"),
    [
        ("gqa", swap_query_heads, {"record"}),
        ("mha", swap_query_heads, {"record", "parent"}),
        ("long", swap_query_heads, {"record", "parent"}),
        ("gqa", drop, {"tensors"}),
        ("gqa", add, {"tensors"}),
        ("gqa", narrow, {"tensors"}),
        ("gqa", spoil, {"finite", "record", "parent", "loading"}),
        ("gqa", untie, {"tensors"}),
        ("gqa", nudge(MLP), {"record", "parent"}),
        ("mha", nudge(NORM), {"record", "parent"}),
    ],
)
def test_changed_weights_are_seen(
    home: Path, tmp_path: Path, kind: str, change: Callable[[Tensors], None], checks: set[str]
) -> None:
    out = shutil.copytree(home / kind, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = verify_model(out, home / "parent")
    assert failed(found) >= checks
    # Without a parent and without the record there is less to go by.
    (out / "headwise.json").unlink()
    assert failed(verify_model(out)) == failed(found) - {"record", "parent"}


def set_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config[name] = value

    change.__name__ = name
    return change


def another_base(config: dict[str, Any]) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 5e4


@pytest.mark.parametrize(
    ("kind", "change", "checks", "words"),
    [
        ("gqa", set_field("num_key_value_heads", 1), {"tensors"}, "k_proj"),
        ("mha", set_field("num_key_value_heads", 4), {"tensors"}, "k_proj"),
        ("gqa", set_field("tie_word_embeddings", False), {"tensors"}, "lm_head"),
        ("gqa", set_field("num_hidden_layers", 1), {"tensors"}, "layers.1"),
        ("gqa", another_base, {"parent", "record"}, "rope_parameters"),
        ("mha", another_base, {"parent", "record"}, "rope_parameters"),
        ("gqa", set_field("rms_norm_eps", 0.1), {"parent", "record"}, "rms_norm_eps"),
        ("gqa", set_field("hidden_act", "gelu"), {"parent", "record"}, "hidden_act"),
        ("long", set_field("rms_norm_eps", 0.1), {"parent", "record"}, "rms_norm_eps"),
        ("long", another_base, {"parent", "record"}, "rope_parameters"),
    ],
)
def test_a_changed_config_is_seen(
    home: Path,
    tmp_path: Path,
    kind: str,
    change: Callable[[dict[str, Any]], None],
    checks: set[str],
    words: str,
) -> None:
    out = shutil.copytree(home / kind, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    found = verify_model(out, home / "parent")
    assert failed(found) == checks and words in found.failures


def test_another_model_is_not_the_parent(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.convert.verify.check.NUM_COMPARED", 0)  # the check itself, not the early refusal
    other = shutil.copytree(home / "parent", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({n: t + 0.01 for n, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    for kind in ("gqa", "mha", "long"):
        assert failed(verify_model(home / kind, other)) == {"parent"}


def test_layers_that_do_not_compute_their_weights_are_seen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the stock class gave a query head another key-value head than headwise thinks."""
    from transformers.models.llama import modeling_llama

    from headwise.convert.verify import layer_inputs

    real, empty = modeling_llama.repeat_kv, layer_inputs.empty_model

    def eager(*arguments: Any) -> Any:
        model = empty(*arguments)
        model.config._attn_implementation = "eager"
        return model

    monkeypatch.setattr(layer_inputs, "empty_model", eager)
    assert verify_model(home / "gqa").passed
    wrong = lambda states, times: real(states.flip(1) if times > 1 else states, times)  # noqa: E731
    monkeypatch.setattr(modeling_llama, "repeat_kv", wrong)
    assert failed(verify_model(home / "gqa")) == {"function"}


@pytest.mark.parametrize("text", ["{}", '{"arguments": 3, "sha256": {}}', "[", "7"])
def test_a_record_that_is_none_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    out = shutil.copytree(home / "gqa", tmp_path / "out")
    (out / "headwise.json").write_text(text)
    with pytest.raises(HeadwiseError, match=r"headwise\.json"):
        verify_model(out)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("child", ["gqa", "mha", "long-mla"])
def test_a_gpu_finds_what_the_cpu_finds(home: Path, child: str) -> None:
    on_cpu, on_gpu = (verify_model(home / child, home / "parent", device=name) for name in ("cpu", "cuda"))
    assert on_gpu.passed and [each.name for each in on_gpu.checks] == [each.name for each in on_cpu.checks]


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("memory", [True, False])
def test_the_cpu_repeats_what_fails_on_a_gpu(
    home: Path, monkeypatch: pytest.MonkeyPatch, sound: bool, memory: bool
) -> None:
    used: list[str] = []
    warned: list[str] = []

    def compared(*_: Any, device: str) -> tuple[bool, str]:
        used.append(device)
        if device != "cpu" and not memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sound and device == "cpu", f"error on {device}"

    monkeypatch.setattr(check, "check_groups", compared)
    monkeypatch.setattr(check, "_loads", lambda *_, device: (True, "loaded"))
    progress = Progress()
    monkeypatch.setattr(progress, "warn", warned.append)
    found = check_folder(open_checkpoint(home / "gqa"), None, device="cuda:1", progress=progress)
    assert used == ["cuda:1", "cpu"] and failed(found) == (set() if sound else {"function"})
    first = "error on cuda:1" if memory else "too little memory"
    assert found.checks[3].detail == f"error on cpu, on the CPU; cuda:1 found: {first}"
    assert len(warned) == 1 and "function" in warned[0] and first in warned[0]


def test_the_device_reaches_every_model_and_every_layer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()
    layers, whole = LayerStream.__init__, PreTrainedModel.to

    def stream(self: LayerStream, *args: Any, **more: Any) -> None:
        used.add(f"layers: {args[3] if len(args) > 3 else 'not given'}")
        layers(self, *args, **more)

    def move(self: Any, *args: Any, **more: Any) -> Any:
        used.add(f"model: {args[0]}")
        return whole(self, *args, **more)

    monkeypatch.setattr(LayerStream, "__init__", stream)
    monkeypatch.setattr(PreTrainedModel, "to", move)
    assert verify_model(home / "mha", home / "parent", device="cpu:0").passed
    assert verify_model(home / "long-mla", home / "parent", device="cpu:0").passed
    assert used - {"model: meta"} == {"layers: cpu:0", "model: cpu:0"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "abacus"}, "`device` is 'abacus', which this machine does not have"),
        ({"hashes": True, "device": "cpu"}, "leave out `device`"),
        ({"hashes": True, "against": "parent"}, "leave out `against`"),
        ({"against": ""}, "`against` is ''"),
    ],
)
def test_wrong_settings_are_refused(home: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        verify_model(home / "gqa", **options)


@pytest.mark.parametrize("kind", ["gqa", "long-mla"])
@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 3}, {"hidden_size": 56}, {"vocab_size": 263}])
def test_a_parent_of_other_sizes_is_refused_from_the_headers(
    home: Path, tmp_path: Path, kind: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_speaking(tmp_path / "other", **sizes)
    monkeypatch.setattr("headwise.convert.verify.check.check_folder", None)
    (name, size), *_ = sizes.items()
    with pytest.raises(SettingError, match=f"not the parent of .*{kind}: {name} is {size} there and ") as refused:
        verify_model(home / kind, other)
    assert refused.value.field == "against" and "converted from" in str(refused.value.hint)


@pytest.mark.parametrize("kind", ["gqa", "long-mla"])
def test_a_fine_tune_of_the_parent_is_refused_before_anything_is_computed(
    home: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(home / "parent", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("headwise.convert.verify.check.check_folder", None)
    with pytest.raises(SettingError, match=r"other weights: model\.norm\.weight differs") as refused:
        verify_model(home / kind, other)
    assert refused.value.field == "against" and "converted from" in str(refused.value.hint)


def test_a_folder_that_was_changed_itself_gets_its_checks(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "gqa", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert failed(verify_model(folder, home / "parent")) == {"record", "parent"}


def test_a_folder_is_not_its_own_parent(home: Path) -> None:
    with pytest.raises(SettingError, match="the folder that is checked"):
        verify_model(home / "gqa", home / "gqa")


def test_a_new_folder_is_checked_for_what_was_scaled(home: Path, tmp_path: Path) -> None:
    """The bytes that a conversion copies are compared where a folder may have changed since."""
    parent = save_speaking(tmp_path / "parent", rms_norm_eps=1e-5)  # its residual stream gets another scale
    convert_model(parent, tmp_path / "out", to="mla", rank=16, rope_dim=8, calibrate="none", verify=False)
    scaled, copied = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"
    for name, seen in ((scaled, {"parent"}), (copied, set())):
        out = shutil.copytree(tmp_path / "out", tmp_path / name)
        tensors = load_file(out / "model.safetensors")
        nudge(name)(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        checkpoint, source = open_checkpoint(out), match_source(open_checkpoint(parent))
        assert failed(check_folder(checkpoint, source)) == seen
        assert "parent" in failed(check_folder(checkpoint, source, finite=True))
