"""What the operating system refuses, said in one sentence; and what must reach the disk before a rename."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError

REASONS = {
    errno.ENOSPC: ("no space is left on the disk", "Free some space, then pass --resume."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, then pass --resume."),
    errno.EACCES: ("permission is denied", "Choose a folder that you may use."),
    errno.EPERM: ("permission is denied", "Choose a folder that you may use."),
    errno.EROFS: ("the file system is read-only", "Choose a folder that you may use."),
    errno.EIO: ("the disk reports an error", "Check the disk, then pass --resume."),
    errno.EXDEV: ("its file system cannot rename folders", "Choose a folder on another file system."),
    errno.ESTALE: ("the network file system has lost it", "Mount it again, then pass --resume."),
    errno.EMFILE: ("this process has too many files open", "Raise `ulimit -n`, then pass --resume."),
    errno.EFBIG: (
        "a file grew larger than it may",
        "Raise `ulimit -f` or choose another file system, then pass --resume.",
    ),
    errno.ENOTDIR: ("a file is where a folder should be", "Name another folder."),
}
# How torch.save says that a file ended early.
TORN = ("inline_container.cc", "iostream error")
# Tokenizer, journal and card beside the weights.
SPARE = 32_000_000


class DiskError(HeadwiseError):
    """A file could not be read or written. The input is not at fault, so the work done is worth keeping."""

    keeps_work = True


@contextmanager
def plain_errors(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn what the operating system refuses into a sentence that names `path`."""
    try:
        yield
    except Exception as error:
        if (refusal := _refusal(error)) is None:
            raise
        reason, hint = REASONS.get(refusal.errno or 0, (refusal.strerror or str(refusal), None))
        raise DiskError(f"{path} cannot be {verb}: {reason}.", hint) from error


def _refusal(error: Exception) -> OSError | None:
    """The operating system's refusal in an error; safetensors and torch write past Python and have it in words."""
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and any(words in str(error) for words in TORN):
        return OSError("only a part of a file was taken; the disk may be full")
    return None


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync folders; their renames are as durable as they get.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def write_all(handle: int, content: bytes | memoryview, at: int | None = None) -> None:
    """Write everything: at an offset, or at the end of a file that was opened to be appended to."""
    left = memoryview(content)
    while left:
        count = os.write(handle, left) if at is None else os.pwrite(handle, left, at)
        left, at = left[count:], None if at is None else at + count


def check_space(folder: Path, nbytes: int) -> None:
    """Raise HeadwiseError unless `nbytes` fit on the disk that `folder` is or will be on."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE > free:
        raise HeadwiseError(
            f"The output needs {nbytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free.",
            "Free some space or choose another disk.",
        )


def space_taken(folder: Path) -> int:
    """Bytes that a folder's files occupy; a file with holes takes less than its length."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
