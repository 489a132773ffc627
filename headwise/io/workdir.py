"""Make files and folders visible by one rename; the work folder of a conversion: lock, journal, recovery."""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from filelock import FileLock, Timeout

from headwise.errors import HeadwiseError
from headwise.io.fs import check_name, check_space, disk_usage, os_errors, sync, write_all


def publish_folder(folder: Path, out: Path, *, replaced: Path | None = None) -> None:
    """Make a complete folder visible as `out` by one rename, once its content is on the disk.

    Args:
        folder: the complete folder, on the file system of `out`.
        out: its final path.
        replaced: where an existing `out` is moved to before; None: `out` must not exist.

    Raises:
        HeadwiseError: `out` is a link, or exists without `replaced`.
        OSError: the operating system's error; `out` is then as it was.
    """
    _refuse_link(out)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)
    replacing = out.exists()
    if replacing and replaced is None:
        raise HeadwiseError(f"{out} exists already.", "Name another folder.")
    if replacing:
        os.rename(out, replaced)  # type: ignore[arg-type]
    try:
        os.rename(folder, out)
    except OSError:
        if replacing:
            os.rename(replaced, out)  # type: ignore[arg-type]
        raise
    sync(out.parent)


def discard_folder(folder: Path, trash: Path) -> None:
    """Rename a folder, then remove it, so that it is never visible in part.

    Args:
        folder: the folder; it may be gone already.
        trash: a path on the same file system that does not exist.
    """
    with suppress(OSError):
        os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a hidden folder that is removed at the end; remove those that killed processes left there before.

    Args:
        parent: the folder in which it is made.
        name: what it is for; folders of the same name on the same machine are searched for remains.

    Yields:
        The folder.
    """
    prefix = f".{name}.{re.sub(r'[^A-Za-z0-9-]', '_', socket.gethostname())}."
    for path in parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(_SCRATCH) and not path.is_symlink():
            _remove_abandoned(path)
    while True:
        folder = Path(tempfile.mkdtemp(_SCRATCH, prefix, parent))
        lock = FileLock(folder / "lock")
        with suppress(FileNotFoundError):
            lock.acquire()
            if (folder / "lock").exists():  # another process may have removed the folder before it was locked
                break
            lock.release()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


_SCRATCH = ".scratch"


def _remove_abandoned(folder: Path) -> None:
    """Remove a scratch folder whose process is dead: the system releases the lock of a dead process."""
    lock = FileLock(folder / "lock", blocking=False)
    with suppress(Timeout, OSError):
        if (folder / "lock").is_file() and not (folder / "lock").is_symlink():
            with lock:
                shutil.rmtree(folder, ignore_errors=True)


def write_file_atomically(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file that is visible only when it is complete and on the disk; replace an existing one.

    Args:
        path: the file.
        content: its bytes, or a function that writes the file to the path that it is given.

    Raises:
        HeadwiseError: `path` is a link.
        OSError: the operating system's error; `path` is then as it was.
    """
    _refuse_link(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # of a process that was killed
    try:
        if callable(content):
            content(unfinished)
        else:
            with open(unfinished, "xb") as file:
                file.write(content)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append_to_file(path: Path, content: bytes) -> None:
    """Append to a file, which is made if there is none.

    Args:
        path: the file.
        content: what to append.

    Raises:
        HeadwiseError: `path` is not a plain file.
        OSError: the operating system's error; a part may be written.
    """
    _refuse_special(path)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        write_all(handle, content)
    finally:
        os.close(handle)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise HeadwiseError(f"{path} is a link, and links are not replaced.", "Name the file or folder itself.")


def _refuse_special(path: Path) -> None:
    """Refuse what is not a plain file: a named pipe would block for ever."""
    _refuse_link(path)
    if path.exists() and not path.is_file():
        raise HeadwiseError(f"{path} is not a file.", "Delete it, then run the command again.")


# The files of a work folder.
_FILES = ("journal.jsonl", "owner", "lock")


class Interrupted(HeadwiseError, KeyboardInterrupt):
    """The user stopped the work; the completed part is kept."""

    exit_code = 130


class WorkFolder:
    """The folder `.OUT.headwise-work` of one conversion.

    It contains the growing `output`, `journal.jsonl` with a line for every completed step, and `lock`.

    Args:
        out: the folder that will be published.
        source: a folder that must not overlap with `out`.
        resume: continue an interrupted run if there is one.
        force: replace an existing model folder.

    Raises:
        HeadwiseError: the name of `out` is not UTF-8.
    """

    def __init__(
        self, out: str | Path, *, source: Path | None = None, resume: bool = False, force: bool = False
    ) -> None:
        check_name(out)
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        self.folder = self.out.parent / f".{self.out.name}.headwise-work"
        self.output, self.replaced = self.folder / "output", self.folder / "replaced"
        self.journal: list[dict[str, Any]] = []
        self.resume, self.force = resume, force
        self._source = source
        self._published = False
        self._filelock = FileLock(self.folder / "lock", blocking=False)

    def start(self, identity: dict[str, Any], nbytes: int) -> None:
        """Take the lock, and begin a new run or continue the interrupted one.

        Args:
            identity: what the output is a function of; a resumed run must have the same.
            nbytes: size of the output.

        Raises:
            HeadwiseError: OUT exists or overlaps with the source, another process writes it, an unfinished run
                exists or differs, or the disk is too small.
        """
        identity = json.loads(json.dumps(identity))
        with os_errors(self.out):
            if self._source is not None:
                _check_apart(self.out, self._source)
            for path in (self.folder, self.output, self.replaced):
                _refuse_link(path)
            self._refuse_odd_entries()
            fresh = not self.folder.exists()
            if fresh:
                # Before anything is created; again below, under the lock.
                self._check_target()
                check_space(self.out, nbytes)
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock()
                self._recover()
                self._check_target()
                self.journal = self._read_journal()
                if self.journal and not (self.resume or self.force):
                    raise HeadwiseError(
                        f"Unfinished work on {self.out} is in {self.folder}.",
                        "Pass `resume` to finish it, or `force` to begin again.",
                    )
                if self.journal and self.resume:
                    self._check_same(self.journal[0]["identity"], identity)
                    check_space(self.out, nbytes - disk_usage(self.output))
                else:
                    self._begin(identity, nbytes)
            except BaseException:
                # A folder without output is the remains of a run that could not remove it.
                self._unlock(remove=fresh or not (self.output.exists() or self.replaced.exists()))
                raise

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the journal.

        Args:
            line: plain JSON data.

        Raises:
            DiskError: the disk fails.
        """
        self.journal.append(line)
        with os_errors(self.out):
            append_to_file(self.folder / "journal.jsonl", json.dumps(line).encode() + b"\n")

    def add(self, name: str, content: bytes) -> None:
        """Write a small file of the output.

        Args:
            name: its path in the output.
            content: its bytes.

        Raises:
            DiskError: the disk fails.
        """
        path = self.output / name
        with os_errors(self.out):
            path.parent.mkdir(exist_ok=True)
            _refuse_link(path.parent)
            _refuse_special(path)
            path.write_bytes(content)
            sync(path)

    def publish(self) -> None:
        """Publish the output as OUT; an old OUT is moved away before and deleted after.

        Raises:
            HeadwiseError: OUT exists and is not replaced, or the disk fails.
        """
        with os_errors(self.out):
            sync(self.output)
            self.append({"finished": True})
            sync(self.folder / "journal.jsonl")
            if self.out.exists() and not self.force:
                raise _exists(self.out)
            try:
                publish_folder(self.output, self.out, replaced=self.replaced)
            finally:
                self._published = not self.output.exists()

    def close(self, error: BaseException | None) -> None:
        """Release the lock, and remove the work folder unless the run can be resumed.

        Args:
            error: the exception that ended the run, or None.

        Raises:
            Interrupted: in place of a KeyboardInterrupt, with the way to resume.
        """
        keep = error is not None and not self._published and not _is_final(error)
        self._unlock(remove=not keep)
        if keep and isinstance(error, HeadwiseError) and str(self.folder) not in str(error):
            error.hint = " ".join(filter(None, (error.hint, f"The work so far is kept in {self.folder}.")))
        if keep and isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"Interrupted; the completed part is kept in {self.folder}.",
                "The same command with `resume` finishes it.",
            ) from None

    def _refuse_odd_entries(self) -> None:
        """Refuse what this program never writes into a work folder: links, named pipes and other special files."""
        for path in map(self.folder.joinpath, _FILES):
            _refuse_special(path)
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            if entry == self.replaced:  # an old OUT may hold links of its user
                continue
            if entry.is_symlink() or not entry.is_dir():
                _refuse_special(entry)
                continue
            for path in entry.rglob("*"):
                if path.is_symlink() or not path.is_dir():
                    _refuse_special(path)

    def _check_target(self) -> None:
        if not self.out.name:
            raise HeadwiseError(f"{self.out} cannot be an output folder.")
        if not os.path.lexists(self.out):
            return
        if not self.force:
            raise _exists(self.out)
        if self.out.is_symlink() or not (self.out / "config.json").is_file():
            # `force` never deletes a folder that is not a model.
            raise HeadwiseError(
                f"{self.out} is not a model folder, so `force` does not replace it.", "Name another OUT."
            )

    def _lock(self) -> None:
        owner = self.folder / "owner"
        try:
            self._filelock.acquire()
        except Timeout:
            raise HeadwiseError(
                f"{self.out} is being written by {_owner(owner) or 'another process'}.",
                "Wait for it, or name another OUT.",
            ) from None
        # The system releases the lock of a process that dies, but network file systems may not share locks.
        host = socket.gethostname()
        previous = _owner(owner)
        if previous and not previous.endswith(f" on {host}"):
            self._filelock.release()
            raise HeadwiseError(
                f"{self.out} is being written by {previous}.", f"If that process has ended, delete {owner}."
            )
        write_file_atomically(owner, f"process {os.getpid()} on {host}".encode())

    def _unlock(self, *, remove: bool) -> None:
        if not self._filelock.is_locked:
            return
        with suppress(OSError):
            (self.folder / "owner").unlink()
        if remove:
            # Under the lock, so that no other process uses it.
            shutil.rmtree(self.folder, ignore_errors=True)
        self._filelock.release()

    def _recover(self) -> None:
        """Complete or undo the renames of a run that died while it published."""
        if self.replaced.exists() and not os.path.lexists(self.out):
            os.rename(self.replaced, self.out)
        finished = (_read(self.folder / "journal.jsonl") or "").endswith('{"finished": true}\n')
        if finished and not self.output.exists() and os.path.lexists(self.out):
            self._unlock(remove=True)
            raise HeadwiseError(f"{self.out} is complete; nothing is left to resume.")

    def _read_journal(self) -> list[dict[str, Any]]:
        path = self.folder / "journal.jsonl"
        if not (path.exists() and self.output.is_dir()):
            return []
        # A killed run or a full disk may leave half a line; the journal ends before it.
        lines: list[dict[str, Any]] = []
        end = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not _is_journal_line(entry) or (not lines and "identity" not in entry):
                break
            lines.append(entry)
            end += len(line)
        os.truncate(path, end)
        return lines

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key, old, new in _differences(before, now):
            raise HeadwiseError(
                f"The unfinished work in {self.folder} cannot be resumed: its {key} was "
                f"{reprlib.repr(old)} and is now {reprlib.repr(new)}.",
                "Repeat it as it was, or pass `force` to begin again.",
            )

    def _begin(self, identity: dict[str, Any], nbytes: int) -> None:
        for path in (self.output, self.replaced):
            if path.exists():
                shutil.rmtree(path)
        (self.folder / "journal.jsonl").unlink(missing_ok=True)
        check_space(self.out, nbytes)
        self.journal = []
        self._check_rename()
        self.output.mkdir()
        self.append({"identity": identity})

    def _check_rename(self) -> None:
        """Check, before the work begins, that the file system can rename folders; some network ones cannot."""
        before, after = self.folder / "probe", self.folder / "probed"
        for path in (before, after):
            shutil.rmtree(path, ignore_errors=True)
        before.mkdir()
        try:
            os.rename(before, after)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.ENOSYS):
                raise
            raise HeadwiseError(
                f"{self.out.parent} is on a file system that cannot rename folders ({error.strerror}), and a model "
                "appears by one rename when it is complete.",
                "Choose a folder on another file system.",
            ) from error
        if before.exists() or not after.is_dir():
            raise HeadwiseError(
                f"{self.out.parent} is on a file system whose renames are not atomic.",
                "Choose a folder on another file system.",
            )
        after.rmdir()


def _check_apart(out: Path, source: Path) -> None:
    target, model = out.resolve(), source.resolve()
    if target == model or target.is_relative_to(model) or model.is_relative_to(target):
        raise HeadwiseError(f"OUT {out} and MODEL {source} overlap.", "Name an OUT beside the model.")


def _exists(out: Path) -> HeadwiseError:
    return HeadwiseError(f"{out} exists already.", "Name another OUT, or pass `force` to replace it.")


def _is_final(error: BaseException) -> bool:
    return isinstance(error, HeadwiseError) and not error.keeps_work


# The keys of a line of the journal, with the types of their values.
_LINES: tuple[dict[str, type], ...] = (
    {"identity": dict}, {"note": str, "value": object}, {"tensor": str, "sha256": str}, {"shard": str},
    {"finished": bool},
)  # fmt: skip


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted path of each value that differs, and the value before and now."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def _is_journal_line(entry: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(entry, dict) and any(
        entry.keys() == kinds.keys() and all(isinstance(entry[key], kind) for key, kind in kinds.items())
        for kinds in _LINES
    )


def _owner(path: Path) -> str | None:
    """Return the process that a work folder's owner file names; None if there is none, or an empty one."""
    content = _read(path)
    if not content:
        return None
    known = content.isprintable() and re.fullmatch(r"process \d+ on [^\ufffd]+", content)
    return content if known else "an unknown process"


def _read(path: Path) -> str | None:
    return path.read_bytes().decode(errors="replace") if path.is_file() else None
