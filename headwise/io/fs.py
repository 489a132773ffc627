"""Report errors of the operating system in one sentence; sync files; measure and check disk space."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.format import size

REASONS = {
    errno.ENOSPC: ("no space is left on the disk", "Free some space, then continue with `resume`."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, then continue with `resume`."),
    errno.EACCES: ("permission is denied", "Choose a folder that you may use."),
    errno.EPERM: ("permission is denied", "Choose a folder that you may use."),
    errno.EROFS: ("the file system is read-only", "Choose a folder that you may use."),
    errno.EIO: ("the disk reports an error", "Check the disk, then continue with `resume`."),
    errno.EXDEV: ("its file system cannot rename folders", "Choose a folder on another file system."),
    errno.ESTALE: ("the network file system lost it", "Mount it again, then continue with `resume`."),
    errno.ENOMEM: ("memory is used up", "Free some memory, then continue with `resume`."),
    errno.EMFILE: ("this process has too many open files", "Raise `ulimit -n`, then continue with `resume`."),
    errno.EFBIG: (
        "a file exceeds the size limit",
        "Raise `ulimit -f` or choose another file system, then continue with `resume`.",
    ),
    errno.ELOOP: ("it holds a link in place of a file", "Delete the link, or name another folder."),
    errno.ENOTDIR: ("a file is where a folder should be", "Name another folder."),
}
# What torch.save reports where a file ends early.
_TORCH_SHORT_WRITE = ("inline_container.cc", "iostream error")
# Tokenizer, journal and card beside the weights.
SPARE_BYTES = 32_000_000


class DiskError(HeadwiseError):
    """A file cannot be read or written. The input is not the cause, so unfinished work is kept."""

    keeps_work = True


@contextmanager
def os_errors(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn errors of the operating system into a sentence that names a path.

    Args:
        path: the file or folder.
        verb: what failed: "written" or "read".

    Raises:
        DiskError: in place of the operating system's error.
    """
    try:
        yield
    except Exception as error:
        if (refusal := _os_error_of(error)) is None:
            raise
        reason, hint = REASONS.get(refusal.errno or 0, (refusal.strerror or str(refusal), None))
        raise DiskError(f"{path} cannot be {verb}: {reason}.", hint) from error


def _os_error_of(error: Exception) -> OSError | None:
    """Return the operating system's error in an exception.

    safetensors and torch write files without Python, and report the error as text.
    """
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "SafetensorError" and (number := re.search(r"\(os error (\d+)\)", str(error))):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_SHORT_WRITE):
        return OSError("only a part of a file was written; the disk may be full")
    return None


def require_folder(path: Path, remedy: str) -> None:
    """Refuse a path that is no folder.

    Args:
        path: that should be a folder.
        remedy: what to do, for the message.

    Raises:
        HeadwiseError: there is no such folder, or the path is a file.
    """
    if not path.is_dir():
        raise HeadwiseError(f"{path} is a file." if path.is_file() else f"There is no folder {path}.", remedy)


def check_name(path: str | Path) -> None:
    """Check that a path is text, as the records and cards that name it are.

    Args:
        path: as the user gave it.

    Raises:
        HeadwiseError: it is no text, or has bytes that are not UTF-8.
    """
    if not isinstance(path, str | Path):
        raise HeadwiseError(f"{path!r} is not a path or a name.", "Give text, such as the path of a folder.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise HeadwiseError(
            f"{str(path)!r} is not a name in UTF-8, and records and cards cannot hold it.", "Rename it."
        ) from None


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a loss of power.

    Args:
        path: the file or folder.

    Raises:
        OSError: the operating system's error.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync folders, and write their entries at once.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def write_all(handle: int, content: bytes | memoryview, at: int | None = None) -> None:
    """Write all bytes to an open file; one system call may write only a part.

    Args:
        handle: the file descriptor.
        content: what to write.
        at: offset in the file; None: the current position, or the end of a file opened with O_APPEND.
    """
    left = memoryview(content)
    while left:
        count = os.write(handle, left) if at is None else os.pwrite(handle, left, at)
        left, at = left[count:], None if at is None else at + count


def check_space(folder: Path, nbytes: int) -> None:
    """Check that a disk has room.

    Args:
        folder: on that disk; it need not exist.
        nbytes: bytes that will be written.

    Raises:
        HeadwiseError: fewer bytes are free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE_BYTES > free:
        raise HeadwiseError(
            f"The output needs {size(nbytes + SPARE_BYTES)} and {folder} has {size(free)} free.",
            "Free some space or choose another disk.",
        )


def disk_usage(folder: Path) -> int:
    """Return the bytes that a folder's files occupy; a sparse file occupies less than its length.

    Args:
        folder: an existing folder.
    """
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
