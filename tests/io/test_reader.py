"""Reading: what a sound checkpoint gives, and the one sentence that each unsound one gets."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headwise.errors import HeadwiseError
from headwise.io.header import make_header
from headwise.io.reader import CHUNK, Checkpoint, has_nonfinite, make_buffers, open_checkpoint
from tests.io.small import CONFIG, make_checkpoint, save_raw, tensors_for


def refused(model: Path, words: str, **options) -> HeadwiseError:
    with pytest.raises(HeadwiseError, match=words) as caught:
        open_checkpoint(model, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def copied_chunks(checkpoint: Checkpoint, name: str) -> list[torch.Tensor]:
    return [chunk.clone() for chunk in checkpoint.chunks(name, make_buffers(2))]


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_tensor_as_it_was_saved(tmp_path, shards):
    tensors = tensors_for(seed=1)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "m", tensors, shards=shards))
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        chunks = torch.cat([*copied_chunks(checkpoint, name), torch.empty(0, dtype=torch.uint8)])
        assert torch.equal(chunks.view(tensor.dtype).view(tensor.shape), tensor)
    checkpoint.check_unchanged()


def test_a_tensor_larger_than_a_chunk_comes_in_whole_elements(tmp_path):
    tensor = torch.arange(CHUNK // 2 + 3, dtype=torch.float32)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "m", {"w": tensor}))
    chunks = copied_chunks(checkpoint, "w")
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, 12]
    assert torch.equal(torch.cat(chunks).view(torch.float32), tensor)


def test_files_that_travel_and_files_that_stay(tmp_path):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    travel = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "generation_config.json"]
    stay = ["modeling_x.py", "model.gguf", "pytorch_model.bin", "consolidated.00.pth", "params.json", "tf.h5"]
    for name in [*travel, *stay, "README.md"]:
        (model / name).write_text("x")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("x")
    (model / "original").mkdir()
    (model / "original" / "tokenizer.json").write_text("x")
    checkpoint = open_checkpoint(model)
    names = {path.relative_to(model).as_posix() for path in checkpoint.sidecars}
    assert names == {*travel, "additional_chat_templates/rag.jinja"}
    assert set(checkpoint.left_out) == set(stay)


def test_fingerprint_tells_a_changed_source(tmp_path):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    before = open_checkpoint(model).fingerprint()
    assert open_checkpoint(model).fingerprint() == before
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert open_checkpoint(model).fingerprint() != before


@pytest.mark.parametrize("change", ["size", "time", "header"])
def test_a_source_that_changes_under_the_reader(tmp_path, change):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    file = model / "model.safetensors"
    checkpoint = open_checkpoint(model)
    status, content = file.stat(), file.read_bytes()
    if change == "size":
        file.write_bytes(content + b"x")
    elif change == "header":
        file.write_bytes(content.replace(b"model.norm.weight", b"model.norn.weight"))
    else:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    if change == "header":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        with pytest.raises(HeadwiseError, match="changed while it was being read"):
            checkpoint.read("model.norm.weight")
    with pytest.raises(HeadwiseError, match="changed while it was being read"):
        checkpoint.check_unchanged()


def test_missing_folder_config_or_weights(tmp_path):
    refused(tmp_path / "nowhere", "no folder")
    model = tmp_path / "m"
    model.mkdir()
    refused(model, "has no config.json")
    (model / "w.gguf").touch()
    refused(model, "GGUF")
    (model / "config.json").write_text("{}")
    refused(model, "GGUF files and no safetensors")
    (model / "w.gguf").unlink()
    refused(model, "has no weights")
    refused(model / "config.json", "is a file")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"a": "\udcff"}', ""])
def test_config_that_is_no_object(tmp_path, text):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    (model / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(model, "config.json (is not valid JSON|contains a list)")


def test_truncated_shard(tmp_path):
    model = make_checkpoint(tmp_path / "m", tensors_for(), shards=2)
    shard = model / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    for length in (len(content) - 1, 100, 7, 0):
        shard.write_bytes(content[:length])
        refused(model, f"{shard.name}.*truncated")
    shard.write_bytes(content + b"\0")
    refused(model, "belong to no tensor")


def index_of(model: Path) -> dict:
    return json.loads((model / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("model-00009-of-00002.safetensors", "names model-00009.*not in"),
        ("../other/model.safetensors", "not a file of its folder"),
        ("/etc/model.safetensors", "not a file of its folder"),
        ("tokenizer.json", "not a file of its folder"),
        (7, "not a file of its folder"),
        ("model-00001-of-00002.safetensors", "does not contain it"),
    ],
)
def test_index_that_points_to_the_wrong_place(tmp_path, shard, words):
    model = make_checkpoint(tmp_path / "m", tensors_for(), shards=2)
    index = index_of(model)
    last = max(index["weight_map"], key=lambda name: index["weight_map"][name])
    index["weight_map"][last] = shard
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, words)


def test_index_without_a_map(tmp_path):
    model = make_checkpoint(tmp_path / "m", tensors_for(), shards=2)
    for content in ({}, {"weight_map": {}}, {"weight_map": ["a"]}):
        (model / "model.safetensors.index.json").write_text(json.dumps(content))
        refused(model, "no weight_map")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refused(model, "no metadata, without which stock transformers does not load")


def test_a_tensor_in_two_shards(tmp_path):
    model = make_checkpoint(tmp_path / "m", tensors_for(), shards=2)
    save_file(tensors_for(), model / "model-00002-of-00002.safetensors")
    refused(model, "is in both")


def test_links_that_leave_the_folder(tmp_path):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    (tmp_path / "secret.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    refused(model, "outside of its folder")
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors").rename(tmp_path / "model.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    refused(model, "outside of its folder")


def test_links_of_a_hub_cache_are_followed(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", tensors_for())
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in plain.iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    checkpoint = open_checkpoint(snapshot)
    assert torch.equal(checkpoint.read("model.norm.weight"), tensors_for()["model.norm.weight"])


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": ROW | {"dtype": "F4"}}, 8, "dtype 'F4'"),
        ({"a": ROW | {"dtype": ["F32"]}}, 8, "dtype"),
        ({"a": ROW | {"shape": [3]}}, 8, "needs 12"),
        ({"a": ROW | {"shape": [-2]}}, 8, "shape"),
        ({"a": ROW | {"shape": [2.0]}}, 8, "shape"),
        ({"a": ROW | {"shape": [True, 2]}}, 8, "shape"),
        ({"a": ROW | {"shape": [1 << 62] * 8}}, 8, "needs"),
        ({"a": ROW | {"shape": [1 << 64]}}, 8, "shape"),
        ({"a": ROW | {"data_offsets": [8, 0]}}, 8, "has -8 bytes"),
        ({"a": ROW | {"data_offsets": [0]}}, 8, "data_offsets"),
        ({"a": ROW | {"extra": 1}}, 8, "must have dtype, shape and data_offsets"),
        ({"a": 3}, 8, "must have dtype, shape and data_offsets"),
        ({"a": ROW, "b": NEXT | {"data_offsets": [4, 8]}}, 8, "starts at byte"),
        ({"a": ROW, "b": NEXT | {"data_offsets": [12, 16]}}, 16, "starts at byte"),
        ({"a": ROW, "b": NEXT}, 8, "truncated"),
        ({"a\u001b[31m": ROW}, 8, "control characters"),
        ([], 0, "not an object"),
        (b'{"a": {}, "a": {}}', 0, "appears twice"),
        (b"\xff\xfe{\0}\0", 0, "not valid"),
        (b"[" * 200_000, 0, "not valid"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "not valid"),
    ],
)
def test_hostile_headers(tmp_path, header, data, words):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    save_raw(model / "model.safetensors", header, b"\0" * data)
    error = refused(model, words)
    assert error.message.isprintable()


@pytest.mark.parametrize("length", [101_000_000, 1 << 40, (1 << 64) - 1])
def test_header_length_beyond_all_bounds(tmp_path, length):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    with open(model / "model.safetensors", "wb") as file:
        file.write(length.to_bytes(8, "little") + b"{}")
        file.truncate(102_000_000)
    refused(model, "truncated" if length > 102_000_000 else "more than the 100000000")


def test_header_written_is_header_read(tmp_path):
    model = make_checkpoint(tmp_path / "m", tensors_for())
    header = make_header([("é", torch.bfloat16, (3, 2)), ("empty", torch.float32, (0, 4)), ("one", torch.bool, ())])
    assert len(header) % 8 == 0
    (model / "model.safetensors").write_bytes(header + bytes(13))
    entries = open_checkpoint(model).tensors
    assert [(e.name, e.dtype, e.shape) for e in entries.values()] == [
        ("é", torch.bfloat16, (3, 2)),
        ("empty", torch.float32, (0, 4)),
        ("one", torch.bool, ()),
    ]
    assert open_checkpoint(model).read("empty").shape == (0, 4)


def pickled(path: Path, content) -> Path:
    model = make_checkpoint(path, tensors_for())
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin")
    return model


def test_pickle_is_read_only_when_asked(tmp_path):
    model = pickled(tmp_path / "m", tensors_for())
    assert "`allow_pickle`" in str(refused(model, "pickle"))
    checkpoint = open_checkpoint(model, allow_pickle=True)
    for name, tensor in tensors_for().items():
        assert torch.equal(checkpoint.read(name), tensor)
        flat = torch.cat([*copied_chunks(checkpoint, name), torch.empty(0, dtype=torch.uint8)])
        assert torch.equal(flat.view(tensor.dtype).view(tensor.shape), tensor)
    checkpoint.check_unchanged()


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_bomb_does_not_go_off(tmp_path):
    model = pickled(tmp_path / "m", {"w": Bomb(tmp_path / "boom")})
    refused(model, "cannot be read as plain tensors", allow_pickle=True)
    assert not (tmp_path / "boom").exists()
    refused(pickled(tmp_path / "n", [1, 2]), "not a table", allow_pickle=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
def test_finds_what_is_not_finite(dtype, value):
    tensor = torch.full((7, 5), torch.finfo(dtype).max, dtype=dtype)
    tensor[3] = torch.finfo(dtype).min
    assert not has_nonfinite(tensor.flatten())
    tensor[6, 4] = value
    assert has_nonfinite(tensor.flatten())
    assert has_nonfinite(tensor) and has_nonfinite(tensor[6, 4]) and has_nonfinite(tensor.T)
    assert not has_nonfinite(torch.ones(3, dtype=torch.int64)) and not has_nonfinite(torch.empty(0, 2))


def test_messages_end_with_what_to_do(tmp_path):
    assert re.search(r"org/name", str(refused(tmp_path / "nowhere", "no folder")))
    assert "Hub repositories" in str(refused(make_checkpoint(tmp_path / "m", tensors_for()), "v1", revision="v1"))
