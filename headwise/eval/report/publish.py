"""Make the folder of a report: refuse an existing one, write beside it, publish by one rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.io.fs import check_name
from headwise.io.workdir import publish_folder, scratch_folder

REPORT = "report.json"


def check_report(out: Path, force: bool) -> None:
    """Refuse a folder that exists, unless it is a report that may be replaced.

    Args:
        out: the report's folder.
        force: whether a report may be replaced; no other folder ever is.

    Raises:
        HeadwiseError: the folder exists and is not replaced, it is inside a file, or its name is not UTF-8.
    """
    check_name(out)
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise HeadwiseError(f"{out} cannot be written: {parent} is a file.", "Give `report` another folder.")
    if not os.path.lexists(out):
        return
    if not force:
        raise HeadwiseError(f"{out} exists.", "Give `report` another folder, or `force` to replace this one.")
    if out.is_symlink() or not (out / REPORT).is_file():
        raise HeadwiseError(
            f"{out} holds no report, so `force` does not replace it.", "Give `report` another folder."
        )


@contextmanager
def published(out: Path, force: bool) -> Iterator[Path]:
    """Yield a folder to work in, which becomes `out` at the end if it holds a report.

    Args:
        out: the report's folder.
        force: whether a report may be replaced.

    Raises:
        HeadwiseError: `out` exists by now and is not replaced.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out.parent, out.name) as scratch:
        work = scratch / "new"
        work.mkdir()
        yield work
        if not (work / REPORT).is_file():  # a process that only computed its share of the tasks
            return
        check_report(out, force)
        publish_folder(work, out, replaced=scratch / "old")
