"""Writing: the same bytes however often it was interrupted, and OUT whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from headwise.errors import GateFailed, HeadwiseError
from headwise.io import fs as disk
from headwise.io import workdir as workfolder
from headwise.io.fs import DiskError
from headwise.io.reader import open_checkpoint
from headwise.io.workdir import Interrupted
from headwise.io.writer import OutputTensor, Writer, plan_shards, unfinished_identity
from tests.io.small import make_checkpoint, tensors_for

IDENTITY = {"source": "abc", "groups": 2, "recipe": {"train": {"tokens": 8}, "seed": 0}}
LIMIT = 2000


@pytest.fixture
def model(tmp_path):
    return make_checkpoint(tmp_path / "model", tensors_for(), shards=2)


def begin(model: Path, out: Path, **options) -> Writer:
    planned = [OutputTensor(e.name, e.dtype, e.shape) for e in open_checkpoint(model).tensors.values()]
    return Writer(
        out,
        planned,
        **{"identity": IDENTITY, "source": model, "max_shard_size": LIMIT} | options,
    )


def convert(model: Path, out: Path, *, check=None, stop=None, **options) -> Path:
    """Copy a checkpoint; every other tensor goes through memory. `stop(n)` may raise before tensor n."""
    checkpoint = open_checkpoint(model)
    with begin(model, out, **options) as writer:
        for number, name in enumerate(checkpoint.tensors):
            if stop:
                stop(number)
            if name in writer.done:
                continue
            writer.note(f"layer {number}", {"error": number / 3})
            if number % 2:
                writer.copy(name, checkpoint)
            else:
                writer.write(name, checkpoint.read(name))
        writer.add_text("config.json", json.dumps(checkpoint.config))
        writer.add_text("notes.json", json.dumps(writer.notes))
        return writer.publish(check)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def work_of(out: Path) -> Path:
    return out.parent / f".{out.name}.headwise-work"


def refused(words: str, *args, **options) -> HeadwiseError:
    with pytest.raises(HeadwiseError, match=words) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_every_tensor_arrives_and_other_readers_agree(model, tmp_path):
    out = convert(model, tmp_path / "out")
    assert out == tmp_path / "out" and not work_of(out).exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    loaded = {}
    for file in set(index["weight_map"].values()):
        part = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in part)
        loaded |= part
        with safe_open(out / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    expected = tensors_for()
    assert loaded.keys() == expected.keys()
    assert all(loaded[n].dtype == t.dtype and torch.equal(loaded[n], t) for n, t in expected.items())
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in expected.values()),
        "total_size": sum(t.nbytes for t in expected.values()),
    }
    assert open_checkpoint(out).tensors.keys() == expected.keys()


def test_one_shard_has_the_plain_name(model, tmp_path):
    out = convert(model, tmp_path / "out", max_shard_size="5GB")
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "notes.json"}
    assert load_file(out / "model.safetensors").keys() == tensors_for().keys()


def test_hashes_are_those_of_the_bytes(model, tmp_path):
    checkpoint = open_checkpoint(model)
    with begin(model, tmp_path / "out") as output:
        for name in checkpoint.tensors:
            output.copy(name, checkpoint)
        assert output.hashes == {
            name: hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
            for name, t in tensors_for().items()
        }
        output.publish()


def test_shards_are_planned_as_the_hub_library_plans_them():
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"t{n}": torch.empty(size) for n, size in enumerate([10, 200, 50, 50, 1, 100, 2, 2])}
    planned = plan_shards([OutputTensor(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], 800)
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=800)
    assert {s.file: [t.name for t in s.tensors] for s in planned} == theirs.filename_to_tensors


COUNT = len(tensors_for())


@pytest.mark.parametrize("number", range(0, COUNT, 2))
def test_resume_after_an_interruption_gives_the_same_bytes(model, tmp_path, number):
    whole = contents(convert(model, tmp_path / "whole"))

    def stop(at):
        if at == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        convert(model, tmp_path / "out", stop=stop)
    assert isinstance(caught.value, Interrupted) and caught.value.exit_code == 130
    assert "`resume`" in str(caught.value)
    assert not (tmp_path / "out").exists()
    refused("Unfinished work on", model, tmp_path / "out")
    assert contents(convert(model, tmp_path / "out", resume=True)) == whole
    assert not work_of(tmp_path / "out").exists()


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.io import test_writer
def stop(at):
    if at == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
test_writer.convert(Path(sys.argv[1]), Path(sys.argv[2]), stop=stop)
"""


def test_resume_after_sigkill_gives_the_same_bytes(model, tmp_path):
    whole = contents(convert(model, tmp_path / "whole"))
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, model, tmp_path / "out", "7"], cwd=Path(__file__).parents[2]
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (work_of(tmp_path / "out") / "owner").exists()
    assert contents(convert(model, tmp_path / "out", resume=True)) == whole


def interrupt(model: Path, out: Path, number: int = 6, **options) -> None:
    def stop(at):
        if at == number:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        convert(model, out, stop=stop, **options)


def test_the_identity_of_unfinished_work_can_be_read(model, tmp_path):
    out = tmp_path / "out"
    assert unfinished_identity(out) == {}
    interrupt(model, out)
    assert {name: unfinished_identity(out)[name] for name in IDENTITY} == IDENTITY
    journal = work_of(out) / "journal.jsonl"
    for damaged in (b"", b"{", b"[]", b'{"identity": 3}\n', b"\xff\n"):
        journal.write_bytes(damaged)
        assert unfinished_identity(out) == {}
    journal.unlink()
    os.mkfifo(journal)
    assert unfinished_identity(out) == {}


def test_resume_does_not_repeat_what_is_done(model, tmp_path):
    interrupt(model, tmp_path / "out")
    with begin(model, tmp_path / "out", resume=True) as output:
        assert output.done == set(list(open_checkpoint(model).tensors)[:6])
        assert output.notes["layer 5"] == {"error": 5 / 3}
        for name, tensor in tensors_for().items():
            if name not in output.done:
                output.write(name, tensor)
        output.publish()


def test_resume_repeats_a_tensor_whose_bytes_were_lost(model, tmp_path):
    whole = contents(convert(model, tmp_path / "whole", max_shard_size="5GB"))
    interrupt(model, tmp_path / "out", max_shard_size="5GB")
    shard = work_of(tmp_path / "out") / "output" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    shard.write_bytes(content)
    assert contents(convert(model, tmp_path / "out", resume=True, max_shard_size="5GB")) == whole


def test_resume_repeats_a_shard_that_is_gone_and_ignores_half_a_journal_line(model, tmp_path):
    whole = contents(convert(model, tmp_path / "whole"))
    interrupt(model, tmp_path / "out")
    min((work_of(tmp_path / "out") / "output").glob("model-00001-*")).unlink()
    with open(work_of(tmp_path / "out") / "journal.jsonl", "a") as journal:
        journal.write('{"tensor": "model.norm')
    interrupt(model, tmp_path / "out", 8, resume=True)
    assert contents(convert(model, tmp_path / "out", resume=True)) == whole


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"identity": IDENTITY | {"groups": 4}}, "groups was 2 and is now 4"),
        ({"identity": IDENTITY | {"source": "changed"}}, "source was 'abc' and is now 'changed'"),
        (
            {"identity": IDENTITY | {"recipe": {"train": {"tokens": 9}, "seed": 0}}},
            "recipe.train.tokens was 8 and is now 9",
        ),
        ({"max_shard_size": "5GB"}, "its tensors was"),
    ],
)
def test_resume_of_something_else_is_refused_and_costs_nothing(model, tmp_path, options, words):
    interrupt(model, tmp_path / "out")
    before = contents(work_of(tmp_path / "out") / "output")
    refused(words, model, tmp_path / "out", resume=True, **options)
    assert contents(work_of(tmp_path / "out") / "output") == before
    convert(model, tmp_path / "out", force=True, **options)


def test_a_second_writer_is_refused_and_the_first_goes_on(model, tmp_path):
    def second(number):
        if number == 3:
            error = refused("is being written by process", model, tmp_path / "out", resume=True)
            assert str(os.getpid()) in str(error)

    out = convert(model, tmp_path / "out", stop=second)
    assert open_checkpoint(out).tensors.keys() == tensors_for().keys()


def test_a_lock_of_another_host_is_believed(model, tmp_path):
    interrupt(model, tmp_path / "out")
    owner = work_of(tmp_path / "out") / "owner"
    owner.write_text("process 7 on elsewhere")
    assert str(owner) in str(refused("process 7 on elsewhere", model, tmp_path / "out", resume=True))
    owner.unlink()
    convert(model, tmp_path / "out", resume=True)


def test_existing_out_is_refused_and_survives(model, tmp_path):
    out = convert(model, tmp_path / "out")
    (out / "mark").write_text("old")
    before = contents(out)
    refused("exists already", model, out)
    refused("exists already", model, out, resume=True)
    interrupt(model, out, force=True)
    assert contents(out) == before
    convert(model, out, force=True, resume=True)
    assert contents(out) == {k: v for k, v in before.items() if k != "mark"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_force_replaces_no_folder_that_is_not_a_model(model, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    refused("not a model folder", model, home, force=True)
    (tmp_path / "link").symlink_to(model)
    refused("not a model folder", model, tmp_path / "link", force=True, source=None)
    assert (home / "thesis.tex").exists() and (model / "config.json").exists()


@pytest.mark.parametrize("place", [".", "sub/out", ".."])
def test_out_and_model_must_not_overlap(model, tmp_path, place):
    refused("overlap", model, model / place, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    assert "sub" not in {p.name for p in model.iterdir()}


def test_a_failed_check_publishes_nothing(model, tmp_path):
    def check(folder):
        assert open_checkpoint(folder).tensors.keys() == tensors_for().keys()
        raise GateFailed("the logits differ")

    kept = tmp_path / ".out.headwise-work"
    refused(rf"logits differ.* The work so far is kept in {kept}\.", model, tmp_path / "out", check=check)
    assert {p.name for p in tmp_path.iterdir()} == {"model", kept.name}
    convert(model, tmp_path / "out", resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("route", ["copy", "write"])
def test_nan_is_refused_unless_allowed(tmp_path, route):
    tensors = tensors_for()
    names = list(open_checkpoint(make_checkpoint(tmp_path / "order", tensors)).tensors)
    name = next(n for i, n in enumerate(names) if "proj" in n and i % 2 == (route == "copy"))
    tensors[name][3, 3] = float("nan")
    model = make_checkpoint(tmp_path / "model", tensors)
    refused(f"Tensor {name} holds NaN", model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not work_of(tmp_path / "out").exists()
    convert(model, tmp_path / "out", allow_nan=True)


def test_a_disk_too_small_is_refused_before_the_first_byte(model, tmp_path, monkeypatch):
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=disk.SPARE_BYTES + 100))
    refused("The output needs", model, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "write", "rename", "open"])
def test_a_disk_that_fails_keeps_the_work_and_resumes(model, tmp_path, monkeypatch, call, number):
    whole = contents(convert(model, tmp_path / "whole"))
    real, count = getattr(os, call), 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        if count > {"pwrite": 5, "fsync": 1, "write": 9, "rename": 1, "open": 12}[call]:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        error = refused("cannot be written", model, tmp_path / "out")
    assert isinstance(error, DiskError)
    assert not (tmp_path / "out").exists()
    assert contents(convert(model, tmp_path / "out", resume=True)) == whole


def test_a_failed_second_rename_puts_the_old_folder_back(model, tmp_path, monkeypatch):
    out = convert(model, tmp_path / "out")
    (out / "mark").write_text("old")
    real, calls = os.rename, []

    def failing(source, target):
        if source.name == "probe":
            return real(source, target)
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        refused("cannot be written", model, out, force=True)
    assert (out / "mark").exists() and len(calls) == 3
    convert(model, out, force=True, resume=True)
    assert not (out / "mark").exists()


def test_killed_between_the_two_renames_of_a_replacement(model, tmp_path, monkeypatch):
    out = convert(model, tmp_path / "out")
    (out / "mark").write_text("old")

    class Killed(BaseException):
        pass

    real, calls = os.rename, []

    def rename(source, target):
        if source.name == "probe":
            return real(source, target)
        calls.append(source)
        if len(calls) == 2:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(Killed):
            convert(model, out, force=True)
    assert not out.exists()
    refused("exists already", model, out, resume=True)
    assert (out / "mark").exists()
    convert(model, out, force=True, resume=True)
    assert not (out / "mark").exists() and not work_of(out).exists()


def test_killed_after_publishing(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(workfolder.WorkFolder, "_unlock", lambda self, remove: self._filelock.release())
        out = convert(model, tmp_path / "out")
    assert work_of(out).exists()
    refused("is complete", model, out, resume=True)
    assert not work_of(out).exists() and contents(out)


def test_a_folder_without_permission(model, tmp_path):
    if os.geteuid() == 0:
        # Root may write everywhere but into a file's inside.
        (tmp_path / "file").touch()
        refused("a file is where a folder should be", model, tmp_path / "file" / "out")
        return
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused("permission is denied", model, locked / "out")


def test_missing_parents_are_made(model, tmp_path):
    assert convert(model, tmp_path / "a" / "b" / "out").is_dir()


def test_nothing_may_be_forgotten(model, tmp_path):
    with pytest.raises(ValueError, match="were not written"), begin(model, tmp_path / "out") as output:
        output.publish()
    with (
        pytest.raises(ValueError, match="planned was"),
        begin(model, tmp_path / "other") as output,
    ):
        output.write("model.norm.weight", torch.zeros(17))


def test_handles_and_threads_are_given_back(model, tmp_path):
    import threading

    convert(model, tmp_path / "out")
    handles, threads = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0, threading.active_count()
    for _ in range(5):
        convert(model, tmp_path / "out", force=True)
    assert threading.active_count() == threads
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == handles


def test_a_tensor_may_be_written_chunk_by_chunk(tmp_path):
    given = torch.randn(7, 5)
    with Writer(tmp_path / "out", [OutputTensor("w", given.dtype, (7, 5))], identity=IDENTITY) as writer:
        for wrong in ((given.flatten()[:30],), (given.flatten(), given[0]), (given.flatten().double(),)):
            with pytest.raises(ValueError, match="planned was"):
                writer.write_chunks("w", wrong)
        assert not writer.done
        writer.write_chunks("w", given.flatten().split(11))
        writer.publish()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], given)
