"""Models that are named on the Hub, fetched by the real client from a server of the tests' own."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

import headwise
from headwise.convert.inspect import inspect_model
from headwise.errors import HeadwiseError
from headwise.io.hub import hub_errors
from headwise.io.reader import open_checkpoint
from headwise.progress import Progress
from tests.hub_server import TOKEN, Repository, point_client_to, serve
from tests.io.small import make_checkpoint, tensors_for

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    disable_progress_bars()
    main = make_checkpoint(tmp_path / "main", tensors_for(), shards=2)
    old = make_checkpoint(tmp_path / "old", tensors_for(seed=5))
    for model in (main, old):
        (model / "config.json").write_text(json.dumps(LLAMA))
        (model / "tokenizer.json").write_text('{"version": "1.0"}')
        (model / "modeling_evil.py").write_text("raise SystemExit")
        (model / "model.gguf").write_text("x")
        (model / "README.md").write_text("---\nlicense: mit\n---\n")
        for folder, name in (("original", "params.json"), ("additional_chat_templates", "rag.jinja")):
            (model / folder).mkdir()
            (model / folder / name).write_text("{}")
    (main / "pytorch_model.bin").write_text("never asked for")
    pickled = make_checkpoint(tmp_path / "pickled", tensors_for())
    (pickled / "model.safetensors").unlink()
    torch.save(tensors_for(), pickled / "pytorch_model.bin")
    repositories = {
        "org/name": Repository({"main": main, "v0": old}),
        "org/secret": Repository({"main": old}, private=True),
        "org/gated": Repository({"main": old}, gated=True),
        "org/pickled": Repository({"main": pickled}),
    }
    with serve(repositories) as running:
        point_client_to(monkeypatch, running, tmp_path / "cache")
        yield running


def same(checkpoint, tensors) -> bool:
    return checkpoint.tensors.keys() == tensors.keys() and all(
        torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items()
    )


def test_a_repository_is_read_like_a_folder(hub):
    checkpoint = open_checkpoint("org/name")
    assert same(checkpoint, tensors_for())
    assert (checkpoint.source, checkpoint.revision) == (
        "org/name",
        hub.repositories["org/name"].commit("main"),
    )
    sidecars = {path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.sidecars}
    assert sidecars == {"tokenizer.json", "additional_chat_templates/rag.jinja"}
    assert (checkpoint.folder / "README.md").exists()


def test_only_what_is_needed_is_downloaded(hub):
    open_checkpoint("org/name")
    assert hub.downloaded() == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "README.md",
        "rag.jinja",
    }


def test_a_revision_is_named_in_two_ways(hub):
    old = tensors_for(seed=5)
    assert same(open_checkpoint("org/name@v0"), old)
    assert same(open_checkpoint("org/name", revision="v0"), old)
    commit = open_checkpoint("org/name@v0").revision
    assert same(open_checkpoint(f"org/name@{commit}"), old)
    with pytest.raises(HeadwiseError, match="two revisions"):
        open_checkpoint("org/name@v0", revision="main")


def test_a_private_repository_wants_the_token(hub):
    with pytest.raises(HeadwiseError, match=r"org/secret does not exist or is private.*hf auth login"):
        open_checkpoint("org/secret")
    assert same(open_checkpoint("org/secret", token=TOKEN), tensors_for(seed=5))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/nothing", "does not exist or is private"),
        ("org/name@v9", "has no revision v9"),
        ("org/gated", "requires that its users accept its terms"),
        ("org/na--me", "is not a repository name"),
        ("org/pickled", "pickle.*`allow_pickle`"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, model, words):
    with pytest.raises(HeadwiseError, match=words) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file", "model.safetensors"),
            "not the cause: No such file at model.safetensors",
        ),
        (OSError(errno.EIO, "Input/output error"), "the disk reports an error at a file of this machine"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "cannot be reached"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_who_is_at_fault(error, words, wrapped):
    with pytest.raises(HeadwiseError, match=words), hub_errors("org/model"):
        if wrapped:
            raise RuntimeError("Error while uploading") from error
        raise error


class Heard(Progress):
    def __init__(self):
        self.stages = []

    def stage(self, name, total=None, unit=""):
        self.stages.append([name, total, unit, 0])

    def advance(self, amount=1, **_):
        self.stages[-1][-1] += amount


def test_a_download_shows_its_bytes_and_the_next_one_nothing(hub):
    heard = Heard()
    folder = open_checkpoint("org/name", progress=heard).folder
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert heard.stages == [["Downloading", total, "bytes", total]]
    open_checkpoint("org/name", progress=heard)
    assert len(heard.stages) == 1


@pytest.mark.parametrize("token", ["hf_wrong", "hf_with a space", "hf_with\nline"])
def test_a_wrong_token_is_refused_and_not_repeated(hub, token):
    with pytest.raises(HeadwiseError, match=r"refuses the token|contains a character") as caught:
        open_checkpoint("org/secret", token=token)
    assert token not in str(caught.value)


def test_a_pickled_repository_when_asked(hub):
    assert same(open_checkpoint("org/pickled", allow_pickle=True), tensors_for())


def test_the_cache_serves_offline(hub, monkeypatch):
    open_checkpoint("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert same(open_checkpoint("org/name"), tensors_for())
    assert inspect_model("org/name").parameters is None
    with pytest.raises(HeadwiseError, match="not in the cache and the Hub cannot be reached"):
        open_checkpoint("org/secret")
    assert len(hub.requests) == before


def test_inspect_downloads_no_weights(hub):
    found = inspect_model("org/name@v0")
    assert found.parameters == sum(tensor.numel() for tensor in tensors_for().values())
    assert (found.parameters_from, found.revision) == ("headers", hub.repositories["org/name"].commit("v0"))
    whole = [path for method, path in hub.requests if method == "GET" and path.endswith("safetensors")]
    assert hub.downloaded() == {"config.json", "model.safetensors"} and len(whole) == 1
    cached = {path.name for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*")}
    assert cached == {"config.json"}


def test_a_huge_generation_config_is_refused_before_a_model_is_loaded(tmp_path):
    folder = make_checkpoint(tmp_path / "model", tensors_for())
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": ["x"]}))
    assert open_checkpoint(folder).tensors
    (folder / "generation_config.json").write_text('{"stop_strings": ' + "[" * 60_000 + "]" * 60_000 + "}")
    with pytest.raises(HeadwiseError, match=r"generation_config\.json is larger than 100,000 bytes"):
        open_checkpoint(folder)


@pytest.mark.parametrize("wrong", [None, 5, ["model"]])
def test_what_is_no_name_is_refused_by_every_verb(wrong: Any, tmp_path: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: headwise.inspect_model(wrong),
        lambda: headwise.convert_model(wrong, tmp_path / "out", to="mqa"),
        lambda: headwise.sample_text(wrong, tmp_path / "text.jsonl"),
        lambda: headwise.update_card(tmp_path, wrong),
        lambda: headwise.push_model(tmp_path, wrong),
    ]
    for call in calls:
        with pytest.raises(HeadwiseError, match="is not a path or a name"):
            call()
    assert not list(tmp_path.iterdir())
