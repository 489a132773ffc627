"""Find the parent of a converted folder again, from its record and from a local file that is not published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.io.source import EMBEDDED_MODEL, find_gguf

# The path of a local parent. A dot hides the file: `push` does not upload it, and `verify` does not hash it.
PARENT = ".headwise-parent"
MAX_PATH = 4096  # bytes


def recorded_source(record: Mapping[str, Any] | None, converted: Path) -> str | Path | None:
    """Return the parent that a folder's record names, where it can be found.

    Args:
        record: the folder's headwise.json, or None.
        converted: the folder.

    Returns:
        The repository and its commit, or a folder or GGUF file of the recorded files: at the path of the
        conversion, beside the converted folder, in the working directory, or the embedded model. None where there
        is none.
    """
    source = (record or {}).get("source")
    if not isinstance(source, dict) or not isinstance(source.get("model"), str):
        return None
    if source.get("revision"):
        return f"{source['model']}@{source['revision']}"
    folders = [converted.parent / source["model"], Path(source["model"]), EMBEDDED_MODEL]
    if (path := read_parent_path(converted)) is not None:
        folders.insert(0, path)
    return next((folder for folder in folders if _has_files(folder, source.get("files"))), None)


def read_parent_path(folder: Path) -> Path | None:
    """Return the path of a local parent at the time of the conversion; None if the folder does not have it.

    Args:
        folder: a converted folder.
    """
    file = folder / PARENT
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_PATH:
        return None
    text = file.read_bytes().decode(errors="replace").strip()
    return Path(text) if text and "\0" not in text else None


def _has_files(folder: Path, files: Any) -> bool:
    """Return whether a model folder, or a GGUF file, has the recorded files."""
    try:
        if not isinstance(files, dict) or not ((folder / "config.json").is_file() or find_gguf(folder)):
            return False
        opened = open_checkpoint(folder).files
    except (HeadwiseError, OSError):
        return False
    return {name: {"bytes": state.size, "header_sha256": state.header} for name, state in opened.items()} == files
