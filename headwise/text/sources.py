"""Where text comes from: a source by its name, as a list of documents or, where it is too long for that, a stream.

A source is `builtin`, `packages`, a file (.txt, .jsonl or .parquet; `*` in its name stands for several), or
`hf:DATASET` or `hf:DATASET:CONFIG` of the Hub. A document is a whole text file or the "text" of a row.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.text import builtin

STREAM_BYTES = 1 << 30  # rows of files up to this size together are read at once
_ROWS = {".jsonl": "json", ".parquet": "parquet"}
# Files that hold documents, but not as one text.
_UNREAD = (".json", ".csv", ".tsv", ".gz", ".zst", ".zip")


def documents(source: str, split: str = "train", characters: int | None = None) -> list[str]:
    """The texts of a source, in a fixed order.

    Args:
        source: see the module.
        split: of `builtin`, one of `builtin.SPLITS`.
        characters: bounds what is read of a data set of the Hub.

    Raises:
        HeadwiseError: no such source, unreadable, a row without a "text".
    """
    if source == "builtin":
        return builtin.library_documents(split)
    if source == "packages":
        return builtin.package_documents()
    if source.startswith("hf:"):
        return list(_until(stream_documents(source, open_stream(source)), characters))
    return [text for path in _files(source) for text in _file(path)]


def is_streamed(source: str) -> bool:
    """Whether a source is read as training goes rather than before it."""
    if source.startswith("hf:"):
        return True
    if Path(source).suffix not in _ROWS:
        return False
    return sum(path.stat().st_size for path in _files(source)) > STREAM_BYTES


def shared(source: str, others: Iterable[str]) -> str | None:
    """The first of `others` that holds text of `source`; the held-out part of `builtin` is in none.

    Raises:
        HeadwiseError: there is no such file.
    """
    own, files = _own_files(source), {other: _own_files(other) for other in others}
    if source == "builtin":
        return None
    return next((other for other in files if other == source or own & files[other]), None)


def open_stream(source: str) -> Any:
    """A `datasets.IterableDataset` with the one column "text"; its position can be saved and restored.

    Raises:
        HeadwiseError: the datasets package is missing, there is no such data set, or it has no column "text".
    """
    try:
        from datasets import Dataset, load_dataset
    except ImportError:
        raise HeadwiseError(f"{source} needs the datasets package.", "pip install 'headwise[train]'") from None
    try:
        if source.startswith("hf:"):
            name, _, config = source.removeprefix("hf:").partition(":")
            rows = load_dataset(name, config or None, split="train", streaming=True)
        elif (kind := _ROWS.get(Path(source).suffix)) is not None:
            files = [str(path) for path in _files(source)]
            rows = load_dataset(kind, data_files=files, split="train", streaming=True)
        else:
            return Dataset.from_dict({"text": documents(source)}).to_iterable_dataset()
        columns = rows.column_names or rows._resolve_features().column_names
    except HeadwiseError:
        raise
    except Exception as error:  # the Hub's own errors are many and their messages good
        raise HeadwiseError(f"The data set {source} cannot be read: {error}") from error
    if "text" not in (columns or []):
        raise HeadwiseError(f'The data set {source} has no "text" column.', f"It has: {', '.join(columns or [])}.")
    return rows.select_columns(["text"])


def stream_documents(source: str, rows: Any) -> Iterator[str]:
    """The texts of an open stream."""
    try:
        for row in rows:
            if row["text"]:
                yield row["text"]
    except Exception as error:
        raise HeadwiseError(f"The data set {source} cannot be read on: {error}") from error


def _until(texts: Iterator[str], characters: int | None) -> Iterator[str]:
    for text in texts:
        yield text
        if characters is not None:
            characters -= len(text)
            if characters <= 0:
                return


def _files(source: str) -> list[Path]:
    """The file of that name, or those that its `*` stand for, sorted."""
    found = sorted(map(Path, glob.glob(source, recursive=True))) if glob.has_magic(source) else []
    for path in found or [Path(source)]:
        if not source or not path.exists():
            raise HeadwiseError(
                f"There is no text file {source or repr(source)}.",
                "A source is builtin, packages, a .txt, .jsonl or .parquet file, or hf:DATASET.",
            )
        if path.is_dir():
            raise HeadwiseError(f"{path} is a folder, not a text.", f"Name its files, such as '{path}/*.jsonl'.")
        if path.suffix in _UNREAD:
            raise HeadwiseError(
                f"{path} is neither plain text nor rows of text.",
                'Make it .jsonl (objects with a "text") or .parquet.',
            )
    return found or [Path(source)]


def _own_files(source: str) -> set[Path]:
    """The files of a source that is files."""
    elsewhere = source in ("builtin", "packages") or source.startswith("hf:")
    return set() if elsewhere else {path.resolve() for path in _files(source)}


def _file(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return list(stream_documents(str(path), open_stream(str(path))))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadwiseError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                texts.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError):
                raise HeadwiseError(f'{path}, line {number}, is not a JSON object with a "text".') from None
    return texts
