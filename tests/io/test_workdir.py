"""Files and folders become visible by one rename: complete or as before, and never through a link."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.io.workdir import (
    WorkFolder,
    append_to_file,
    discard_folder,
    publish_folder,
    scratch_folder,
    write_file_atomically,
)


def folder(path: Path, text: str) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text)
    return path


def test_a_linked_folder_is_refused_before_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkFolder(tmp_path / "out", resume=True)
    work.folder.mkdir()
    (work.folder / "training").symlink_to(folder(tmp_path / "elsewhere", "1"))
    listed: list[Path] = []
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: iter(listed.append(path) or ()))
    with pytest.raises(HeadwiseError, match="training is a link"):
        work.start({}, 1)
    assert not listed


def text_of(path: Path) -> str:
    return (path / "inner" / "file").read_text()


def refuse_rename_of(source_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == source_name:
            raise OSError(5, "the disk reports an error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)


def test_a_folder_is_published_and_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish_folder(folder(tmp_path / "first", "1"), out)
    assert text_of(out) == "1" and not (tmp_path / "first").exists()
    with pytest.raises(HeadwiseError, match="exists already"):
        publish_folder(folder(tmp_path / "second", "2"), out)
    assert text_of(out) == "1"
    publish_folder(tmp_path / "second", out, replaced=tmp_path / "old")
    assert text_of(out) == "2" and text_of(tmp_path / "old") == "1"


def test_the_old_folder_returns_if_the_new_one_cannot_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = folder(tmp_path / "out", "1"), folder(tmp_path / "new", "2")
    refuse_rename_of("new", monkeypatch)
    with pytest.raises(OSError, match="disk reports"):
        publish_folder(new, out, replaced=tmp_path / "old")
    assert text_of(out) == "1" and text_of(new) == "2" and not (tmp_path / "old").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_not_replaced(tmp_path: Path, dangling: bool) -> None:
    target = tmp_path / "target"
    if not dangling:
        folder(target, "1")
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(HeadwiseError, match="link is a link"):
        publish_folder(folder(tmp_path / "new", "2"), link, replaced=tmp_path / "old")
    with pytest.raises(HeadwiseError, match="link is a link"):
        write_file_atomically(link, b"2")
    assert link.is_symlink() and target.exists() != dangling


def test_content_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    publish_folder(folder(tmp_path / "new", "1"), tmp_path / "out")
    before = {Path(event).name for event in events[: events.index("rename")]}
    assert before == {"new", "inner", "file"} and events[-1] == str(tmp_path)


def test_a_file_is_written_from_bytes_or_by_a_function(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file_atomically(path, b"1")
    assert path.read_bytes() == b"1"
    write_file_atomically(path, lambda unfinished: unfinished.write_text("2"))
    assert path.read_bytes() == b"2" and os.listdir(tmp_path) == ["file"]


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file_atomically(path, b"1")

    def fail(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        write_file_atomically(path, fail)
    assert path.read_bytes() == b"1" and os.listdir(tmp_path) == ["file"]


def test_a_file_is_continued_and_never_through_a_link_or_into_a_pipe(tmp_path: Path) -> None:
    append_to_file(tmp_path / "file", b"1")
    append_to_file(tmp_path / "file", b"2")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("link", "is a link"), ("pipe", "is not a file")):
        with pytest.raises(HeadwiseError, match=problem):
            append_to_file(tmp_path / name, b"3")
    assert (tmp_path / "file").read_bytes() == b"12"


def test_the_remains_of_a_killed_writer_are_no_obstacle(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("1")
    (tmp_path / ".file.unfinished").symlink_to(precious)
    write_file_atomically(tmp_path / "file", b"2")
    assert precious.read_text() == "1" and sorted(os.listdir(tmp_path)) == ["file", "precious"]


def test_a_folder_is_discarded_by_a_rename_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = folder(tmp_path / "old", "1")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before anything is deleted
    discard_folder(old, tmp_path / "trash")
    assert not old.exists() and text_of(tmp_path / "trash") == "1"


@pytest.mark.parametrize(
    "line", ['{"identity": []}', '{"identity": {}, "more": 1}', "[]", '{"tensor": 3, "sha256": ""}', "\xff"]
)
def test_a_journal_that_headwise_did_not_write_is_not_resumed(tmp_path: Path, line: str) -> None:
    work = WorkFolder(tmp_path / "out", resume=True)
    (work.output).mkdir(parents=True)
    (work.folder / "journal.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    (work.folder / "owner").write_bytes(b"\xff\xfe")
    with pytest.raises(HeadwiseError, match="is being written by an unknown process"):
        work.start({"a": 1}, 1)
    (work.folder / "owner").unlink()
    work.start({"a": 1}, 1)
    assert work.journal == [{"identity": {"a": 1}}]
    work.close(None)


@pytest.mark.parametrize("name", ["", "output", "journal.jsonl", "owner", "lock"])
def test_a_work_folder_with_links_is_refused(tmp_path: Path, name: str) -> None:
    work = WorkFolder(tmp_path / "out", resume=True)
    victim = tmp_path / "victim"
    victim.mkdir()
    link = work.folder / name if name else work.folder
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(HeadwiseError, match="is a link"):
        work.start({}, 1)
    assert not list(victim.iterdir())


def test_a_scratch_folder_of_a_killed_process_is_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from headwise.io.workdir import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1]), 'r') as f: (f / 'new').mkdir(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (dead,) = tmp_path.iterdir()
    assert (dead / "new").is_dir()
    other = tmp_path / ".r.another-host.x.scratch"
    other.mkdir()
    (other / "lock").touch()
    with scratch_folder(tmp_path, "r") as first, scratch_folder(tmp_path, "r") as second:
        assert sorted(tmp_path.iterdir()) == sorted([other, first, second])
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("name", ["journal.jsonl", "owner", "output/model.safetensors", "text/x", "output/card"])
def test_a_pipe_in_a_work_folder_is_refused(tmp_path: Path, name: str) -> None:
    work = WorkFolder(tmp_path / "out", resume=True)
    work.start({}, 1)
    work.close(OSError())
    (work.folder / name).unlink(missing_ok=True)
    (work.folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(work.folder / name)
    with pytest.raises(HeadwiseError, match=f"{name} is not a file"):
        work.start({}, 1)
        work.add("card", b"x")
