"""A report's folder: refused where it exists, made beside it, published by one rename."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError


def check_report(out: Path, force: bool) -> None:
    """Refuse a report's folder that exists, unless it may be replaced.

    Raises:
        HeadwiseError: it is there, or it is no folder.
    """
    if out.exists() and not (force and out.is_dir()):
        raise HeadwiseError(f"{out} exists.", "Pass --report with another folder, or --force to replace it.")


@contextmanager
def published(out: Path, force: bool) -> Iterator[Path]:
    """A folder to work in that becomes `out` at the end, if all goes well and something was written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        work = Path(scratch) / "new"
        work.mkdir()
        yield work
        if not (work / "report.json").is_file():  # a process that only helped
            return
        check_report(out, force)
        if out.exists():
            out.replace(Path(scratch) / "old")
        work.replace(out)
