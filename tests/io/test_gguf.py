"""GGUF files as models: the tensors, config and tokenizer that they become, and files that are refused."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.plan import Plan
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError, SettingError
from headwise.io import gguf as gguf_reader
from headwise.io.gguf_config import load_gguf_table
from headwise.io.reader import Checkpoint, as_bytes, make_buffers, open_checkpoint
from headwise.io.tokenizer import load_tokenizer
from headwise.models.config import stock_text_config
from headwise.models.stock import load_model
from headwise.records.manifest import read_record
from headwise.records.parent import recorded_source
from headwise.train.student import ModelFolder
from tests.command_line import run
from tests.io.gguf_files import (
    MODELS,
    SIZES,
    TEXTS,
    expected_tensors,
    tiny_model,
    tiny_tokenizer,
    tokenizer_metadata,
    write_gguf,
)

TOKENS = torch.arange(3, 40)[None]
# tokenizer.ggml.pre -> the pieces of "it's 2024" before any merge.
PIECES = {
    "gpt-2": ["it", "'s", "Ġ2024"],
    "smollm": ["it", "'s", "Ġ", "2", "0", "2", "4"],
    "llama-bpe": ["it", "'s", "Ġ", "202", "4"],
    "llama3": ["it", "'s", "Ġ", "202", "4"],
    "llama-v3": ["it", "'s", "Ġ", "202", "4"],
    "qwen2": ["it", "'s", "Ġ", "2", "0", "2", "4"],
    "deepseek-r1-qwen": ["it", "'s", "Ġ", "2", "0", "2", "4"],
    "tekken": ["it", "'s", "Ġ", "2", "0", "2", "4"],
}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.double()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-q8.gguf", "llama", Kind.Q8_0)


def refused(path: Path, *words: str) -> HeadwiseError:
    """The error of opening a file: one sentence that has these words, on the command line as well."""
    with pytest.raises(HeadwiseError) as raised:
        open_checkpoint(path)
    message = raised.value.message
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message
    result = run("inspect", str(path))
    assert result.exit_code == 2 and "Traceback" not in result.output
    return raised.value


# ---------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("model_type", MODELS)
def test_tensors_are_the_dequantised_ones_of_the_stock_class(tmp_path: Path, model_type: str, kind: Kind) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model_type, kind))
    dtype = torch.float32 if kind == Kind.F32 else torch.bfloat16
    expected = expected_tensors(model_type, kind, dtype)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (dtype, checkpoint.tensors[name].shape)
        assert torch.equal(read, tensor), name


@pytest.mark.parametrize(
    "kind", [Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
)
def test_kinds_that_the_package_only_reads(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """K-quants have no quantiser in Python: random blocks are compared with the package's own values."""
    from gguf import GGML_QUANT_SIZES, GGUFWriter, dequantize

    monkeypatch.setattr(gguf_reader, "ELEMENTS", 512)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (6, 2 * block_bytes), dtype=np.uint8)
    blocks.reshape(12, -1)[:, -2:] = blocks.reshape(12, -1)[:, :2] = np.array([0, 0x2C], np.uint8)  # finite scales
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf_reader.read_gguf_header(tmp_path / "m.gguf").tensors["x"]
    assert (tensor.shape, tensor.kind_name) == ((6, 2 * block), kind.name)
    with open(tmp_path / "m.gguf", "rb", buffering=0) as file:
        file.seek(tensor.offset)
        values = np.concatenate(list(gguf_reader.dequantised(tensor, file)))
    np.testing.assert_array_equal(values.reshape(6, -1), dequantize(blocks, kind))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_logits_are_those_of_transformers(tmp_path: Path, model_type: str, kind: Kind) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_type, kind)
    auto = transformers.AutoModelForCausalLM
    expected = logits_of(auto.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval())
    actual = logits_of(load_model(open_checkpoint(path), "AutoModelForCausalLM", torch.float32).eval())
    # transformers keeps float32 here, and headwise reads all files but those in F32 as bfloat16.
    assert relative(actual, expected) < (1e-6 if kind == Kind.F32 else 2e-2)
    original = logits_of(tiny_model(model_type))
    assert relative(actual, original) < {Kind.F32: 1e-6, Kind.F16: 2e-2, Kind.Q8_0: 5e-2, Kind.Q4_0: 0.5}[kind]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_chunks_are_the_bytes_of_the_tensor(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_reader, "ELEMENTS", 160)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model_type, Kind.Q4_0))
    for name in checkpoint.tensors:
        chunks = torch.cat([chunk.clone() for chunk in checkpoint.chunks(name, make_buffers(2))])
        assert torch.equal(chunks, as_bytes(checkpoint.read(name))), name


def test_one_part_of_a_tensor_is_in_memory_beside_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's memory is traced; torch's, which holds the tensor itself, is not."""
    monkeypatch.setattr(gguf_reader, "ELEMENTS", 256)
    checkpoint = open_checkpoint(llama)
    name = "model.embed_tokens.weight"
    checkpoint.read(name)
    tracemalloc.start()
    checkpoint.read(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * checkpoint.tensors[name].nbytes / 2 / 4  # a quarter of the tensor in float32


def test_a_file_that_changes_is_noticed(tmp_path: Path, llama: Path) -> None:
    path = Path(shutil.copy(llama, tmp_path / "m.gguf"))
    checkpoint = open_checkpoint(path)
    before = checkpoint.fingerprint()
    checkpoint.check_unchanged()
    assert open_checkpoint(path).fingerprint() == before
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(HeadwiseError, match=r"m\.gguf changed"):
        checkpoint.read("model.norm.weight")
    with pytest.raises(HeadwiseError, match=r"m\.gguf changed"):
        checkpoint.check_unchanged()
    assert open_checkpoint(path).fingerprint() != before


def test_a_split_file_is_one_model(tmp_path: Path) -> None:
    whole = open_checkpoint(write_gguf(tmp_path / "whole.gguf", "qwen2", Kind.Q8_0))
    first = write_gguf(tmp_path / "m.gguf", "qwen2", Kind.Q8_0, split=10)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3 and first == parts[0]
    for path in parts:
        split = open_checkpoint(path)
        assert split.files.keys() == {part.name for part in parts} and split.config == whole.config
        for name in whole.tensors:
            assert torch.equal(split.read(name), whole.read(name))


# ------------------------------------------------------------------------------------------- config, tokenizer


@pytest.mark.parametrize("model_type", MODELS)
def test_the_config_is_that_of_the_model(tmp_path: Path, model_type: str) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", model_type, Kind.Q8_0)).config
    assert config["architectures"] == [type(tiny_model(model_type)).__name__]
    actual = stock_text_config(model_type, config).to_dict()
    original = tiny_model(model_type).config.to_dict()
    ignored = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "_name_or_path"}
    different = {k: (actual.get(k), v) for k, v in original.items() if k not in ignored and actual.get(k) != v}
    assert not different
    assert (actual["bos_token_id"], actual["eos_token_id"], actual["pad_token_id"]) == (1, 2, 0)
    assert config["rms_norm_eps"] == 1e-5 and config["dtype"] == "bfloat16"


def test_every_row_has_a_tiny_model() -> None:
    rows = load_gguf_table()["architectures"].values()
    types = {row["model_type"] for row in rows}
    types |= {variant["model_type"] for row in rows for variant in row["variants"].values()}
    assert types == set(MODELS)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12, 0.1])
def test_the_epsilon_is_the_decimal_of_the_original_config(tmp_path: Path, eps: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata={"attention.layer_norm_rms_epsilon": eps})
    assert open_checkpoint(path).config["rms_norm_eps"] == eps


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 50000.0}),
        ({"rope.freq_base": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope.scaling.type": "none"}, {"rope_type": "default", "rope_theta": 50000.0}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
        ),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.yarn_beta_fast": 30.0,
            },
            {
                "rope_type": "yarn",
                "rope_theta": 50000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 30.0,
            },
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], rope: dict[str, Any]) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata)).config
    assert config["rope_parameters"] == rope
    stock_text_config("llama", config)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_rope_become_the_llama3_rule(tmp_path: Path, factor: float) -> None:
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": factor, **rule}
    stock = transformers.LlamaConfig(**(SIZES | {"rope_parameters": rope, "max_position_embeddings": 131072}))
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](stock, "cpu")[0].numpy()
    plain = 50000.0 ** (-np.arange(0, 32, 2) / 32)
    path = write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": (plain / scaled).astype(np.float32)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_parameters"] == rope
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_other_factors_of_rope_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 5, 16, dtype=np.float32)
    refused(write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}), "m.gguf", "rope_freqs.weight")


@pytest.mark.parametrize("pattern", [3, [True, True, False, True, True, False]])
def test_the_windows_of_layers(tmp_path: Path, pattern: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", "gemma3_text", metadata={"attention.sliding_window_pattern": pattern})
    kinds = open_checkpoint(path).config["layer_types"]
    assert kinds == 2 * (2 * ["sliding_attention"] + ["full_attention"])


def test_an_equal_head_stays_tied_and_another_does_not(tmp_path: Path) -> None:
    tied = open_checkpoint(write_gguf(tmp_path / "absent.gguf", "qwen2"))
    embedding = tied.read("model.embed_tokens.weight").numpy()
    for name, head, expected in (("same", embedding, True), ("other", 2 * embedding, False)):
        checkpoint = open_checkpoint(write_gguf(tmp_path / f"{name}.gguf", "qwen2", extra={"output.weight": head}))
        assert checkpoint.config["tie_word_embeddings"] is expected
        assert ("lm_head.weight" in checkpoint.tensors) is not expected
    assert torch.equal(checkpoint.read("lm_head.weight"), torch.from_numpy(2 * embedding))
    assert tied.config["tie_word_embeddings"] is True and "lm_head.weight" not in tied.tensors


def test_the_tokenizer_is_the_original(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    tokenizer, original = load_tokenizer(checkpoint.folder, llama), tiny_tokenizer()
    for text in (*TEXTS, "", "<|begin|>hi<|end|>", "日本 12  3"):
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids) == original.decode(ids, skip_special_tokens=False)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
    assert tokenizer.model_max_length == 256
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|begin|>hi<|end|>"
    generation = json.loads((checkpoint.folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("pre", load_gguf_table()["pre_tokenizers"])
def test_every_kind_of_pieces_decodes_to_its_text(tmp_path: Path, pre: str) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": pre}))
    tokenizer = load_tokenizer(checkpoint.folder, tmp_path)
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 2024")]
    assert pieces == PIECES[pre]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def sentencepiece(**more: Any) -> dict[str, Any]:
    """A vocabulary of sentencepiece's: bytes, letters, and pieces in the order in which they were learned."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [3, 3, 3, 2, *([6] * 256)]
    letters = ["▁", *"helowrd"]
    learned = ["he", "ll", "▁w", "hell", "hello", "or", "▁wor", "ld", "▁world", "▁▁", "<turn>"]
    tokens += [*letters, *learned]
    types += [*([1] * (len(letters) + len(learned) - 1)), 4]
    tokens += [f"[unused{i}]" for i in range(320 - len(tokens))]
    types += [5] * (320 - len(types))
    return {
        **dict.fromkeys(tokenizer_metadata()),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(i) for i in range(320)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize(
    ("more", "text", "pieces"),
    [
        ({"add_space_prefix": False}, "hello world", ["<s>", "hello", "▁world"]),
        ({"add_space_prefix": False}, "hello  world", ["<s>", "hello", "▁", "▁world"]),
        ({"add_space_prefix": False, "add_bos_token": False}, "hello\n", ["hello", "<0x0A>"]),
        ({"add_bos_token": True, "add_eos_token": True}, "world", ["<s>", "▁world", "</s>"]),
        ({"add_space_prefix": False}, "he<turn>é", ["<s>", "he", "<turn>", "<0xC3>", "<0xA9>"]),
    ],
)
def test_sentencepiece(tmp_path: Path, more: dict[str, Any], text: str, pieces: list[str]) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=sentencepiece(**more)))
    tokenizer = load_tokenizer(checkpoint.folder, tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_end_of_a_turn_ends_a_generation(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.eot_token_id": 7})
    checkpoint = open_checkpoint(path)
    generation = json.loads((checkpoint.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7]


def test_named_chat_templates_are_kept(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_template.../x": "no"}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata))
    names = {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.sidecars}
    assert names == {
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# ------------------------------------------------------------------------------------ inspect, convert, verify


def test_inspect(llama: Path) -> None:
    inspection = inspect_model(llama)
    assert inspection.model_type == "llama" and inspection.dtype == torch.bfloat16
    assert inspection.parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert inspection.layouts[0].num_key_value_heads == 2
    result = run("inspect", str(llama), "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["parameters"] == inspection.parameters


def test_the_bound_of_rope_is_drawn(llama: Path, tmp_path: Path) -> None:
    result = run("inspect", str(llama), "--context", "512", "--plot", str(tmp_path / "bound.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "bound.png").read_bytes().startswith(b"\x89PNG")


def test_the_file_is_found_as_the_recorded_parent(llama: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(llama, tmp_path / llama.name))
    convert_model(path, tmp_path / "out", to="mqa", calibrate="none", verify=False)
    converted, record = open_checkpoint(tmp_path / "out"), read_record(tmp_path / "out")
    assert recorded_source(record, converted.folder) == path
    teacher = ModelFolder.of(open_checkpoint(path)).load(torch.float32)
    assert relative(logits_of(teacher), logits_of(tiny_model("llama"))) < 5e-2
    write_gguf(path, "llama", Kind.Q4_0)
    assert recorded_source(record, converted.folder) is None


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"to": "mqa", "calibrate": "none"}),
        ("llama", {"to": "mha"}),
        ("llama", {"to": "mla", "exact": True}),
        ("llama", {"to": "mla", "rank": 48, "rope_dim": 16, "calibrate": "none"}),
        ("qwen2", {"to": "mqa", "calibrate": "none"}),
        ("gemma3_text", {"to": "mqa", "calibrate": "none"}),
    ],
    ids=str,
)
def test_a_conversion_equals_that_of_the_folder(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_type, Kind.Q8_0)
    convert_model(path, tmp_path / "folder", dtype="bfloat16", verify=False)
    for source in (path, tmp_path / "folder"):
        out = tmp_path / f"{source.stem}-out"
        assert isinstance(convert_model(source, out, **settings, verify=False), ConvertResult)
        assert verify_model(out, path).passed
    one, other = open_checkpoint(tmp_path / "m-out"), open_checkpoint(tmp_path / "folder-out")
    assert one.config == other.config and one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name
    for sidecar in one.sidecars:
        assert sidecar.read_bytes() == (other.folder / sidecar.relative_to(one.folder)).read_bytes()


def test_a_calibrated_conversion_and_its_records(tmp_path: Path, llama: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS) * 400)
    out = tmp_path / "out"
    plan = convert_model(llama, out, to="mqa", calibrate=str(text), refit="off", dry_run=True)
    assert isinstance(plan, Plan)
    assert "tiny-q8.gguf" in plan.notes[0] and "Q8_0" in plan.notes[0] and "bfloat16" in plan.notes[0]
    convert_model(llama, out, to="mqa", calibrate=str(text), refit="off")
    record = read_record(out)
    assert record is not None and record["source"]["model"] == "tiny-q8.gguf"
    assert record["source"]["files"]["tiny-q8.gguf"]["bytes"] == llama.stat().st_size
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert card["license"] == "apache-2.0"
    result = run("verify", str(out), "--against", str(llama))
    assert result.exit_code == 0, result.output
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_key_value_heads == 1 and logits_of(loaded).isfinite().all()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(TEXTS[0])["input_ids"] == tiny_tokenizer().encode(TEXTS[0]).ids


def test_another_parent_is_refused_at_once(tmp_path: Path, llama: Path) -> None:
    convert_model(llama, tmp_path / "out", to="mqa", calibrate="none")
    other = write_gguf(tmp_path / "other.gguf", "llama", Kind.Q4_0)
    with pytest.raises(SettingError, match=r"has the sizes of the parent .* and other weights"):
        verify_model(tmp_path / "out", other)


def test_out_may_be_beside_the_file_and_not_around_it(tmp_path: Path, llama: Path) -> None:
    path = Path(shutil.copy(llama, tmp_path / "m.gguf"))
    convert_model(path, tmp_path / "out", to="mqa", calibrate="none")
    with pytest.raises(HeadwiseError, match="overlap"):
        convert_model(path, tmp_path, to="mqa", calibrate="none", force=True)
    assert path.exists()


# ------------------------------------------------------------------------------------------------ refused files


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        refused(path, "m.gguf", "is not a GGUF file")
    path.unlink()
    refused(path, "There is no file", "m.gguf")


@pytest.mark.parametrize(
    ("version", "words"), [(struct.pack("<I", 1), "version 1"), (struct.pack(">I", 3), "big-endian")]
)
def test_other_versions(tmp_path: Path, llama: Path, version: bytes, words: str) -> None:
    content = bytearray(llama.read_bytes())
    content[4:8] = version
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", "m.gguf", words)


def test_truncated_files(tmp_path: Path, llama: Path) -> None:
    content, path = llama.read_bytes(), tmp_path / "m.gguf"
    for length in (5, 20, 30, 200, 5000, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:length])
        refused(path, "m.gguf", "truncated")


def test_the_message_of_a_truncated_file_names_the_field(tmp_path: Path, llama: Path) -> None:
    content, path = llama.read_bytes(), tmp_path / "m.gguf"
    path.write_bytes(content[: content.index(b"tokenizer.ggml.tokens") + 60])
    refused(path, "tokenizer.ggml.tokens")
    path.write_bytes(content[:-100])
    assert "tensor " in refused(path, "ends at byte").message


def test_an_unknown_quantisation_type(tmp_path: Path, llama: Path) -> None:
    content, path = bytearray(llama.read_bytes()), tmp_path / "m.gguf"
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 16
    for number, word in ((99, "type 99"), (4, "type 4"), (int(Kind.Q8_K), "Q8_K"), (int(Kind.I32), "I32")):
        content[place : place + 4] = struct.pack("<I", number)
        path.write_bytes(content)
        refused(path, "m.gguf", "blk.0.attn_q.weight", word)


@pytest.mark.parametrize("architecture", ["mamba", "bert", "qwen2moe"])
def test_an_unknown_architecture(tmp_path: Path, llama: Path, architecture: str) -> None:
    content = llama.read_bytes()
    field = struct.pack("<Q", 5) + b"llama"
    new = struct.pack("<Q", len(architecture)) + architecture.encode()
    place = content.index(field)
    # A key of another length moves the data, whose offsets count from an aligned start.
    header = content[:place] + new + content[place + len(field) :]
    (tmp_path / "m.gguf").write_bytes(header + bytes(64))
    error = refused(tmp_path / "m.gguf", "m.gguf", "general.architecture", architecture)
    assert "llama" in (error.hint or "")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.type": "mmproj"}, ("mmproj", "general.type")),
        ({"general.type": "adapter"}, ("LoRA", "general.type")),
        ({"block_count": 3}, ("llama.block_count", "3")),
        ({"block_count": None}, ("llama.block_count", "missing")),
        ({"embedding_length": 0}, ("llama.embedding_length",)),
        ({"feed_forward_length": [96, 64]}, ("llama.feed_forward_length", "no single number")),
        ({"attention.head_count": 3}, ("llama.attention.head_count",)),
        ({"attention.key_length": 16}, ("llama.attention.key_length", "16")),
        ({"rope.dimension_count": 16}, ("llama.rope.dimension_count", "16")),
        ({"rope.scaling.type": "longrope"}, ("llama.rope.scaling.type", "longrope")),
        ({"expert_count": 8}, ("llama.expert_count", "8")),
        ({"logit_scale": 0.5}, ("llama.logit_scale", "0.5")),
        ({"attention.causal": False}, ("llama.attention.causal",)),
        ({"tokenizer.ggml.model": "rwkv"}, ("tokenizer.ggml.model", "rwkv")),
        ({"tokenizer.ggml.model": None}, ("tokenizer.ggml.model",)),
        ({"tokenizer.ggml.pre": "poro-chat"}, ("tokenizer.ggml.pre", "poro-chat")),
        ({"tokenizer.ggml.tokens": None}, ("tokenizer.ggml.tokens",)),
        ({"tokenizer.ggml.merges": ["a b c"]}, ("tokenizer.ggml.merges",)),
        ({"tokenizer.ggml.token_type": [1, 2]}, ("tokenizer.ggml.token_type",)),
        ({"tokenizer.ggml.bos_token_id": 5000}, ("tokenizer.ggml.bos_token_id", "5000")),
        ({"general.alignment": 3}, ("general.alignment",)),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_read(tmp_path: Path, metadata: dict[str, Any], words: tuple[str, ...]) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(HeadwiseError) as raised:
        open_checkpoint(path)
    assert all(word in raised.value.message for word in ("m.gguf", *words)), raised.value.message


def test_a_vision_encoder(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_tensor("v.patch_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "mmproj.gguf", "mmproj", "general.architecture", "clip")


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", without=[""])
    refused(path, "m.gguf", "vocabulary", "no tensors")


def test_a_missing_part(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", split=10)
    second = sorted(tmp_path.glob("m-*.gguf"))[1]
    second.rename(tmp_path / "moved.gguf")
    refused(first, second.name, "missing", "split")
    refused(tmp_path / "moved.gguf", "moved.gguf", "split.no")
    (tmp_path / "moved.gguf").rename(second)
    shutil.copy(first, second)
    refused(first, second.name, "split.no")


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    refused(write_gguf(tmp_path / "m.gguf", extra=extra), "m.gguf", "blk.0.attn_sinks.weight", "llama")


def test_a_missing_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", without=["layers.1.mlp.up_proj"])
    with pytest.raises(HeadwiseError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        convert_model(path, tmp_path / "out", to="mqa", calibrate="none")
    refused(write_gguf(tmp_path / "n.gguf", without=["embed_tokens"]), "token_embd.weight")


def test_the_counts_of_a_header_are_not_believed(tmp_path: Path, llama: Path) -> None:
    content, path = bytearray(llama.read_bytes()), tmp_path / "m.gguf"
    key = b"tokenizer.ggml.tokens"
    places = {8: "tensors", 16: "metadata", content.index(key) + len(key) + 8: "tokens"}
    for place in places:
        for number in (1 << 20, 1 << 40, (1 << 64) - 1):
            changed = bytearray(content)
            changed[place : place + 8] = struct.pack("<Q", number)
            path.write_bytes(changed)
            refused(path, "m.gguf")


def test_overlapping_tensors(tmp_path: Path, llama: Path) -> None:
    content, path = bytearray(llama.read_bytes()), tmp_path / "m.gguf"
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 16 + 4
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    refused(path, "m.gguf", "overlaps")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_raise_no_other_error(tmp_path: Path, llama: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    content, path = bytearray(llama.read_bytes()), tmp_path / "m.gguf"
    for place in random.integers(0, 12_000, size=3):
        content[place] = int(random.integers(256))
    path.write_bytes(content)
    try:
        checkpoint: Checkpoint = open_checkpoint(path)
        checkpoint.read(next(iter(checkpoint.tensors)))
    except HeadwiseError as error:
        assert "\n" not in error.message


def test_verbs_that_need_a_folder(llama: Path, tmp_path: Path) -> None:
    for words in (["verify", str(llama)], ["bench", str(llama), "--baseline", str(llama)]):
        result = run(*words)
        assert result.exit_code == 2 and ".gguf" in result.output and "Traceback" not in result.output
    result = run("inspect", str(llama), "--revision", "main")
    assert result.exit_code == 2 and "is for Hub repositories" in result.output
