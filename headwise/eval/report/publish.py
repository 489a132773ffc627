"""A report's folder: refused where it exists, made beside it, published by one rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError

REPORT = "report.json"


def check_report(out: Path, force: bool) -> None:
    """Refuse a report's folder that exists, unless it may be replaced.

    Raises:
        HeadwiseError: it is there, or it holds no report: `force` must never cost anybody another folder.
    """
    if not os.path.lexists(out):
        return
    if not force:
        raise HeadwiseError(f"{out} exists.", "Pass --report with another folder, or --force to replace it.")
    if out.is_symlink() or not (out / REPORT).is_file():
        raise HeadwiseError(
            f"{out} holds no report, so --force does not replace it.", "Pass --report with another."
        )


@contextmanager
def published(out: Path, force: bool) -> Iterator[Path]:
    """A folder to work in that becomes `out` at the end, if all goes well and something was written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        work = Path(scratch) / "new"
        work.mkdir()
        yield work
        if not (work / REPORT).is_file():  # a process that only helped
            return
        check_report(out, force)
        old = Path(scratch) / "old"
        if out.exists():
            out.replace(old)
        try:
            work.replace(out)
        except OSError:
            if old.exists():
                old.replace(out)
            raise
