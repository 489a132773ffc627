"""Push with the real client over HTTP: refusals, the files that arrive, and interruptions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM

from headwise.cli import cli
from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError
from headwise.records.parent import PARENT
from headwise.records.push import push_model
from tests.convert.speaking import contents, save_speaking
from tests.hub_server import READ_ONLY, TOKEN, Repository, point_client_to, serve

QUICK: dict[str, Any] = {"to": "gqa", "groups": 2, "calibrate": "none", "max_shard_size": 60_000}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    save_speaking(folder / "model")
    convert_model(folder / "model", folder / "out", **QUICK)
    return folder


@pytest.fixture
def out(converted, tmp_path) -> Path:
    return shutil.copytree(converted / "out", tmp_path / "out")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with serve({}, tmp_path / "hub") as running:
        point_client_to(monkeypatch, running, tmp_path / "cache")
        yield running
    enable_progress_bars()


def run(*words: Any, **environment: str):
    return CliRunner(env={"HEADWISE_DEBUG": "", **environment}).invoke(cli, [str(word) for word in words])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def published(folder: Path) -> dict[str, bytes]:
    """The files of a folder that are for others: the path of its parent is not."""
    return {name: content for name, content in contents(folder).items() if name != PARENT}


def shards(files) -> set[str]:
    return {name for name in files if name.endswith(".safetensors")}


def test_a_folder_arrives_whole_and_is_pulled_again(hub, out, tmp_path):
    pushed = push_model(out, "org/new", token=TOKEN)
    remote = hub.repositories["org/new"]
    assert pushed.creates_repository and pushed.verified and not pushed.private and len(shards(pushed.files)) > 2
    assert pushed.changed
    arrived = contents(remote.folder("main"))
    assert arrived.pop(".gitattributes") and arrived == published(out)
    assert (pushed.commit, pushed.url) == (remote.commit("main"), f"{hub.endpoint}/org/new/commit/{pushed.commit}")
    assert hub.count("POST .*/commit/main") == 1, "all files appear together"
    # The repository can be converted again, and the record has the commit.
    again = convert_model("org/new@main", tmp_path / "again", to="mqa", calibrate="none")
    assert isinstance(again, ConvertResult) and again.plan.revision == pushed.commit
    record = json.loads((tmp_path / "again" / "headwise.json").read_text())
    assert record["source"]["revision"] == pushed.commit
    assert f"org/new@{pushed.commit}" in record["command"]
    assert verify_model(tmp_path / "again", f"org/new@{pushed.commit}").passed


def test_nothing_is_sent_twice(hub, out):
    push_model(out, "org/new", token=TOKEN)
    sent = hub.count("PUT")
    second = push_model(out, "org/new", token=TOKEN)
    assert hub.count("PUT") == sent == len(shards(second.files))
    assert second.commit == hub.repositories["org/new"].commit("main") and not second.creates_repository
    assert second.changed is False
    result = run("push", out, "org/new", "--create-pr", "--token", TOKEN)
    assert result.exit_code == 0 and "holds exactly this already, so nothing was sent" in result.stdout
    assert "Pushed" not in result.stdout


@pytest.mark.parametrize("stage", ["upload", "commit"])
def test_an_error_in_the_middle_is_reported_and_the_next_run_continues(hub, out, stage):
    files = sorted(shards(contents(out)))
    # The client itself tries an upload six times; it is the second file that never succeeds.
    broken = {"upload": f"PUT /lfs/{sha256(out / files[1])}", "commit": "POST .*/commit/"}[stage]
    hub.failures[broken] = 6
    with pytest.raises(HeadwiseError, match=r"responds with 500.*Run the same command again"):
        push_model(out, "org/new", token=TOKEN)
    remote = hub.repositories["org/new"]
    assert set(contents(remote.folder("main"))) == {".gitattributes"}, "half a model is never visible"
    uploaded = len(list((hub.storage / "objects").iterdir()))
    assert uploaded == {"upload": 1, "commit": len(files)}[stage]
    before, hub.failures[broken] = hub.count("PUT"), 0
    push_model(out, "org/new", token=TOKEN)
    assert hub.count("PUT") - before == len(files) - uploaded
    assert published(out).items() <= contents(remote.folder("main")).items()


def test_the_default_storage_of_the_real_hub(hub, out, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HeadwiseError, match=r"has no Xet storage.*HF_HUB_DISABLE_XET=1"):
        push_model(out, "org/new", token=TOKEN)
    hub.xet = True
    push_model(out, "org/new", token=TOKEN)
    arrived = contents(hub.repositories["org/new"].folder("main"))
    for name in shards(contents(out)):
        assert arrived[name].decode() == f"xet {sha256(out / name)}"
    assert hub.count("PUT") == 0


def test_private_repositories(hub, out, tmp_path):
    assert push_model(out, "org/secret", private=True, token=TOKEN).private
    assert hub.repositories["org/secret"].private
    assert push_model(out, "org/secret", token=TOKEN).private, "an existing repository stays private"
    with pytest.raises(HeadwiseError, match="does not exist or is private"):
        convert_model("org/secret", tmp_path / "x", to="mqa")
    hub.repositories["org/open"] = Repository({"main": hub.storage / "empty"})
    with pytest.raises(HeadwiseError, match="exists and is public"):
        push_model(out, "org/open", private=True, token=TOKEN)


def test_a_branch_is_made(hub, out):
    push_model(out, "org/new", token=TOKEN)
    first = hub.repositories["org/new"].commit("main")
    (out / "README.md").write_text("changed")
    pushed = push_model(out, "org/new", revision="v2", token=TOKEN)
    remote = hub.repositories["org/new"]
    assert (remote.commit("main"), remote.commit("v2")) == (first, pushed.commit)
    assert push_model(out, "org/new@v2", token=TOKEN).revision == "v2"


def test_a_pull_request_changes_no_branch(hub, out):
    hub.repositories["org/other"] = Repository({"main": foreign(out.parent)})
    pushed = push_model(out, "org/other", create_pr=True, token=TOKEN)
    remote = hub.repositories["org/other"]
    assert pushed.pull_request == f"{hub.endpoint}/org/other/discussions/1"
    assert remote.folder("main") == out.parent / "foreign"
    assert pushed.deleted == ("model.safetensors",)
    assert "model.safetensors" not in contents(remote.folder("refs/pr/1"))


def foreign(parent: Path) -> Path:
    """Write another model in one file, which transformers would load in place of the pushed shards."""
    folder = parent / "foreign"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"other")
    (folder / "notes.md").write_text("kept")
    return folder


def test_another_model_is_replaced_only_by_force(hub, out):
    hub.repositories["org/other"] = Repository({"main": foreign(out.parent)})
    with pytest.raises(HeadwiseError, match=r"holds another model than one made from model.*`force`"):
        push_model(out, "org/other", token=TOKEN)
    pushed = push_model(out, "org/other", force=True, token=TOKEN)
    arrived = contents(hub.repositories["org/other"].folder("main"))
    assert pushed.deleted == ("model.safetensors",) and "model.safetensors" not in arrived
    assert arrived["notes.md"] == b"kept"


def test_a_new_conversion_of_the_same_model_replaces_the_old(hub, out, converted, tmp_path):
    push_model(out, "org/new", token=TOKEN)
    convert_model(converted / "model", tmp_path / "mqa", to="mqa", calibrate="none")
    pushed = push_model(tmp_path / "mqa", "org/new", token=TOKEN)
    assert set(pushed.deleted) == shards(contents(out)) | {"model.safetensors.index.json"}
    assert shards(contents(hub.repositories["org/new"].folder("main"))) == {"model.safetensors"}
    record = tmp_path / "mqa" / "headwise.json"
    record.write_text(record.read_text().replace('"model": "model"', '"model": "another"'))
    with pytest.raises(HeadwiseError, match="holds another model than one made from another"):
        push_model(tmp_path / "mqa", "org/new", token=TOKEN)


def test_what_would_be_loaded_beside_the_weights_is_deleted(hub, out, tmp_path):
    push_model(out, "org/new", token=TOKEN)
    repository = hub.repositories["org/new"]
    before = shutil.copytree(repository.folder("main"), tmp_path / "before")
    loaded = {"adapter_config.json", "chat_template.jinja", "additional_chat_templates/x.jinja", "vocab.txt"}
    for name in (*loaded, "train.py"):
        (before / name).parent.mkdir(exist_ok=True)
        (before / name).write_text("{}")
    repository.move("main", before, "f" * 40)
    pushed = push_model(out, "org/new", token=TOKEN)
    assert set(pushed.deleted) == loaded and "train.py" in pushed.left
    assert not loaded & contents(repository.folder("main")).keys()


def test_a_repository_that_held_an_adapter_loads_with_peft(hub, out, tmp_path):
    pytest.importorskip("peft")
    push_model(out, "org/new", token=TOKEN)
    repository = hub.repositories["org/new"]
    before = shutil.copytree(repository.folder("main"), tmp_path / "before")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/other", "r": 2, "target_modules": ["q_proj"]}
    (before / "adapter_config.json").write_text(json.dumps(adapter))
    repository.move("main", before, "f" * 40)

    def load(cache: str) -> Any:
        return AutoModelForCausalLM.from_pretrained("org/new", cache_dir=tmp_path / cache, token=TOKEN)

    with pytest.raises(OSError, match="org/other"):  # transformers follows the adapter to its base model
        load("adapter")
    push_model(out, "org/new", token=TOKEN)
    pulled, local = load("pushed").state_dict(), AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert pulled.keys() == local.keys() and all(torch.equal(pulled[name], local[name]) for name in local)


def test_only_branches_are_pushed_to(hub, out):
    push_model(out, "org/new", token=TOKEN)
    repository = hub.repositories["org/new"]
    commit = repository.heads["main"]
    repository.heads["v1"], repository.tags = commit, {"v1"}
    for revision in ("v1", commit):
        with pytest.raises(HeadwiseError, match="is a tag or a commit, and a push needs a branch"):
            push_model(out, "org/new", revision=revision, token=TOKEN)
    card = out / "README.md"
    for number, revision in enumerate(("feature/x", "feature/x", "refs/pr/7")):
        repository.heads.setdefault("refs/pr/7", commit)
        card.write_text(card.read_text() + f"\n{number}\n")
        assert push_model(out, "org/new", revision=revision, token=TOKEN).changed
        assert (repository.folder(revision) / "README.md").read_text() == card.read_text()
    assert repository.heads["main"] == repository.heads["v1"] == commit


def test_a_cache_that_cannot_be_written_is_named(hub, out, tmp_path, monkeypatch):
    push_model(out, "org/new", token=TOKEN)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(HeadwiseError, match="is not the cause: a file is where a folder should be at") as caught:
        inspect_model("org/new", token=TOKEN)
    assert "Set HF_HOME" in str(caught.value.hint)


def test_a_dry_run_changes_nothing(hub, out):
    planned = push_model(out, "org/new", dry_run=True)
    assert planned.commit is None and planned.creates_repository and planned.files.keys() == published(out).keys()
    assert not hub.repositories and {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_needs_no_connection(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run("push", out, "org/new@dev", "--dry-run", "--json")
    planned = json.loads(result.stdout)
    assert result.exit_code == 0 and planned["files"].keys() == published(out).keys()
    assert (planned["repo"], planned["revision"], planned["creates_repository"]) == ("org/new", "dev", None)
    assert "HF_HUB_OFFLINE is set" in planned["unreachable"]
    assert "was not compared with the repository" in result.stderr and not hub.repositories
    for words in (["org/new"], ["new", "--dry-run"]):  # a real push needs the Hub, and a name is always checked
        assert run("push", out, *words, "--token", TOKEN).exit_code == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in str(push_model(out, "org/new", dry_run=True).unreachable)


def test_hidden_files_are_not_pushed(hub, out):
    for name in (".git/config", ".cache/x", ".env", "logs/.hidden/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("secret")
    (out / ".eval_results").mkdir()
    (out / ".eval_results" / "headwise.yaml").write_text("[]")
    files = push_model(out, "org/new", dry_run=True).files
    assert not [name for name in files if name.startswith(".") and not name.startswith(".eval_results/")]
    assert ".eval_results/headwise.yaml" in files and "logs/.hidden/x" not in files


def unverified(out: Path) -> None:
    record = json.loads((out / "headwise.json").read_text())
    (out / "headwise.json").write_text(json.dumps(record | {"verification": None}))


def failed(out: Path) -> None:
    text = (out / "headwise.json").read_text()
    (out / "headwise.json").write_text(text.replace('"passed": true', '"passed": false', 1))


def test_an_accepted_failure_is_pushed_and_named(hub, out):
    record = json.loads((out / "headwise.json").read_text())
    record["verification"]["checks"][1]["passed"] = record["verification"]["passed"] = False
    record["verification"]["accepted"] = ["layout"]
    (out / "headwise.json").write_text(json.dumps(record))
    pushed = push_model(out, "org/new", token=TOKEN)
    assert pushed.verified and pushed.accepted == ("layout",)
    assert "failed the check layout, and the failure was accepted" in hub.descriptions[-1]
    record["verification"]["accepted"] = ["cache"]
    (out / "headwise.json").write_text(json.dumps(record))
    with pytest.raises(HeadwiseError, match="failed its verification"):
        push_model(out, "org/new", token=TOKEN)


def other_weights(out: Path) -> None:
    path = next(out.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_config(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unverified, "was not verified"),
        (failed, "failed its verification"),
        (other_weights, r"has changed since it was verified \(.*weight\)"),
        (other_config, r"has changed since it was verified \(config\.json\)"),
    ],
)
def test_an_unverified_folder_is_refused(hub, out, change, words):
    change(out)
    with pytest.raises(HeadwiseError, match=words + ".*`unverified`"):
        push_model(out, "org/new", token=TOKEN)
    assert not hub.requests
    assert not push_model(out, "org/new", unverified=True, token=TOKEN).verified
    assert "unverified" in hub.descriptions[-1]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("There is no folder", ["nowhere", "org/new"]),
        ("headwise.json is missing", ["model", "org/new"]),
        ("is not a repository name", ["out", "new"]),
        ("is not a repository name", ["out", "../x/y"]),
        ("is not a repository name", ["out", "org/ne--w", "--token", TOKEN]),
        ("no Hub token", ["out", "org/new"]),
        ("refuses the token", ["out", "org/new", "--token", "hf_wrong"]),
        ("contains a character", ["out", "org/new", "--token", "hf_two\nlines"]),
        ("does not permit this token", ["out", "org/new", "--token", READ_ONLY]),
        ("does not permit this token", ["out", "stranger/new", "--token", TOKEN]),
        ("not to v2", ["out", "org/new", "--create-pr", "--revision", "v2", "--token", TOKEN]),
        ("two revisions", ["out", "org/new@a", "--revision", "b", "--token", TOKEN]),
    ],
)
def test_bad_input_is_one_sentence(hub, converted, monkeypatch, words, arguments):
    monkeypatch.chdir(converted)
    result = run("push", *arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and words in errors[0], result.stderr
    assert "Traceback" not in result.stderr and "bug" not in result.stderr and result.stdout == ""
    assert "hf_wrong" not in result.output and "hf_two" not in result.output


def test_offline_is_reported(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HeadwiseError, match="HF_HUB_OFFLINE is set"):
        push_model(out, "org/new", token=TOKEN)
    assert not hub.requests


def test_the_variables_of_the_client_apply(hub, converted, tmp_path):
    """In a process of its own, because the client reads them when it is imported."""
    words = "import sys; from headwise.cli import main; sys.argv[0] = 'headwise'; main()"
    command = [sys.executable, "-c", words, "push", str(converted / "out"), "org/new", "--json"]
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    client = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(command, env=inherited | client, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["commit"] == hub.repositories["org/new"].commit("main")
    assert TOKEN not in result.stdout + result.stderr
    assert "Comparing and uploading" in result.stderr and "%|" not in result.stderr, (
        "only the progress of headwise is shown"
    )


def test_convert_pushes_at_the_end_and_checks_the_repository_first(hub, converted, tmp_path):
    options = ["--to", "mqa", "--calibrate", "none", "--push-to-hub", "org/new", "--token", TOKEN]
    result = run("convert", converted / "model", tmp_path / "a", *options, "--private", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["pushed"]["commit"] == hub.repositories["org/new"].commit("main")
    assert hub.repositories["org/new"].private
    early = run("convert", converted / "model", tmp_path / "b", *options[:-1], "hf_wrong")
    assert early.exit_code == 2 and "refuses the token" in early.stderr and not (tmp_path / "b").exists()
    hub.failures["POST .*/commit/"] = 1
    late = run("convert", converted / "model", tmp_path / "c", *options)
    assert late.exit_code == 2 and "is complete: `headwise push" in late.stderr and (tmp_path / "c").exists()
    clash = run("convert", converted / "model", tmp_path / "d", *options, "--no-verify")
    assert clash.exit_code == 2 and "leave out --no-verify" in clash.stderr


def test_the_token_is_never_written(hub, converted, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    options = ["--to", "mqa", "--calibrate", "none", "--push-to-hub", "org/new", "--token", TOKEN, "-v"]
    hub.failures["PUT"] = 2
    output = run("convert", converted / "model", tmp_path / "out", *options).output
    output += run("push", tmp_path / "out", "org/new", "--token", TOKEN, "--json", HEADWISE_DEBUG="1").output
    hub.failures["POST"] = 20
    output += run("push", tmp_path / "out", "org/new", "--token", TOKEN, HEADWISE_DEBUG="1").output
    assert TOKEN not in output and TOKEN not in caplog.text and "responds with 500" in output
    # The folder, the storage of the server, and the cache of the client.
    for folder in (tmp_path / "out", hub.storage, tmp_path / "cache"):
        assert not [name for name, content in contents(folder).items() if TOKEN.encode() in content]
