"""A report's folder appears whole, and --force replaces a report and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.eval.report.publish import REPORT, check_report, published


def write(out: Path, text: str, force: bool = False) -> None:
    with published(out, force) as work:
        (work / REPORT).write_text(text)


def test_a_report_replaces_a_report_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write(out, "old")
    with pytest.raises(HeadwiseError, match="exists"):
        write(out, "new")
    assert (out / REPORT).read_text() == "old"
    write(out, "new", force=True)
    assert (out / REPORT).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_costs_nobody_another_folder(tmp_path: Path, kind: str) -> None:
    out, kept = tmp_path / "mine", tmp_path / "kept"
    kept.mkdir()
    (kept / REPORT).write_text("linked")
    if kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("years")
    elif kind == "file":
        out.write_text("years")
    else:
        out.symlink_to(kept)
    with pytest.raises(HeadwiseError, match="holds no report"):
        check_report(out, force=True)
    with pytest.raises(HeadwiseError, match="holds no report"):
        write(out, "new", force=True)
    assert out.read_text() == "years" if kind == "file" else out.exists()
    assert kind != "folder" or (out / "thesis.tex").read_text() == "years"
    assert (kept / REPORT).read_text() == "linked"


def test_the_old_report_comes_back_if_the_new_one_cannot_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report"
    write(out, "old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError(5, "the disk reports an error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError):
        write(out, "new", force=True)
    assert (out / REPORT).read_text() == "old"


def test_a_report_inside_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(HeadwiseError, match=r"note\.txt/a/b cannot be written: .*note\.txt is a file"):
        check_report(tmp_path / "note.txt" / "a" / "b", force=False)
