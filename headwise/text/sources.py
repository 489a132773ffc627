"""Read the documents of a text source: a list, or a stream where the source is too long to be read at once.

A source is `builtin`, `mixture`, `packages`, a file (.txt, .jsonl or .parquet; `*` in its name stands for several),
or `hf:DATASET` or `hf:DATASET:CONFIG` of the Hub. A document is a whole text file, the "text" of a row, or the
conversation in its "messages".
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from headwise import fields
from headwise.errors import HeadwiseError
from headwise.fields import Setting, check_fields, declare
from headwise.schema import not_legal
from headwise.text import builtin, mixture
from headwise.text.chat import Chat, read_chat

SELF = "self"  # text that is sampled from the parent before the training
STREAM_BYTES = 1 << 30  # rows of files up to this size together are read at once
_ROWS = {".jsonl": "json", ".parquet": "parquet"}
# Files that hold documents, but neither plain text nor rows of text.
_UNREAD = (".json", ".csv", ".tsv", ".gz", ".zst", ".zip")


def _check_sources(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise ValueError
    for source, times in value.items():
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise not_legal(f"text.{source}", times, "a whole number of at least 1")
    return {str(source): times for source, times in value.items()}


def _check_heldout_blocks(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError
    return value


@dataclass(frozen=True)
class Data:
    """The text of a recipe, and how it is cut into blocks.

    Raises:
        SettingError: a value is not legal.
    """

    text: Mapping[str, int] = declare(
        MISSING,
        Setting(
            "Source to the number of times it occurs in one pass.",
            wanted="a mapping of sources to the number of times each is read",
            check=_check_sources,
        ),
    )
    length: int = fields.length("Tokens in a block.", minimum=2, default=1024)
    separate_documents: bool = fields.flag(
        "Mask attention between documents that share a block, and start each at position 0.", default=True
    )
    heldout: str = fields.text(
        "Source that measures progress and is not trained on; of builtin, its held-out modules.",
        default="builtin",
        metavar="SOURCE",
    )
    heldout_blocks: int | None = fields.other(
        "Blocks of the held-out text (null: all there are).",
        default=64,
        check=_check_heldout_blocks,
        wanted="a whole number of at least 1, or null",
        metavar="N",
        parse=int,
    )

    def __post_init__(self) -> None:
        check_fields(self)


def documents(source: str, split: str = "train", characters: int | None = None) -> list[str | Chat]:
    """Return the texts and conversations of a source, in a fixed order.

    Args:
        source: `builtin`, `mixture`, `packages`, a file, or `hf:DATASET`.
        split: of `builtin` and `mixture`, one of `builtin.SPLITS`.
        characters: about how many to read of a data set of the Hub; None: all.

    Raises:
        HeadwiseError: there is no such source, it cannot be read, or a row has neither "text" nor "messages".
    """
    if source == "builtin":
        return [*builtin.library_documents(split)]
    if source == "mixture":
        return [*mixture.mixture_documents(split)]
    if source == SELF:
        raise HeadwiseError(
            "The text self is sampled from the parent, for the training text of a recipe only.",
            "Write it with `headwise sample` and give the file.",
        )
    if source == "packages":
        return [*builtin.package_documents()]
    if source.startswith("hf:"):
        return list(_up_to(stream_documents(source, open_stream(source)), characters))
    return [text for path in _files(source) for text in _read_file(path)]


def is_streamed(source: str) -> bool:
    """Return whether a source is read during training, because it is too long to be read before."""
    if source.startswith("hf:"):
        return True
    if Path(source).suffix not in _ROWS:
        return False
    return sum(path.stat().st_size for path in _files(source)) > STREAM_BYTES


def overlapping(source: str, others: Iterable[str]) -> str | None:
    """Return the first of `others` that holds text of `source`; none holds the held-out part of a built-in source.

    Args:
        source: a held-out source.
        others: sources to train on.

    Raises:
        HeadwiseError: a file is missing.
    """
    files, files_of = _resolved_files(source), {other: _resolved_files(other) for other in others}
    if source in ("builtin", "mixture"):
        return None
    return next((other for other in files_of if other == source or files & files_of[other]), None)


def open_stream(source: str) -> Any:
    """Open a source as a `datasets.IterableDataset`; its position can be saved and restored.

    It has the column "messages", or else "text".

    Args:
        source: files, or a data set of the Hub.

    Raises:
        HeadwiseError: the datasets package is missing, there is no such data set, or it has neither column.
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
    column = next((name for name in ("messages", "text") if name in (columns or [])), None)
    if column is None:
        raise HeadwiseError(
            f'The data set {source} has no "text" or "messages" column.', f"It has: {', '.join(columns or [])}."
        )
    return rows.select_columns([column])


def stream_documents(source: str, rows: Any) -> Iterator[str | Chat]:
    """Yield the texts and conversations of an open stream.

    Args:
        source: its name, for error messages.
        rows: as `open_stream` returns them.

    Raises:
        HeadwiseError: the stream breaks off.
    """
    try:
        for number, row in enumerate(rows, start=1):
            if row.get("messages"):
                yield read_chat(row["messages"], f"{source}, row {number}")
            elif row.get("text"):
                yield row["text"]
    except HeadwiseError:
        raise
    except Exception as error:
        raise HeadwiseError(f"The data set {source} cannot be read further: {error}") from error


def _up_to(texts: Iterator[str | Chat], characters: int | None) -> Iterator[str | Chat]:
    for text in texts:
        yield text
        if characters is not None:
            characters -= len(text)
            if characters <= 0:
                return


def _files(source: str) -> list[Path]:
    """Return the file of that name, or the files that match its `*`, sorted."""
    matches = sorted(map(Path, glob.glob(source, recursive=True))) if glob.has_magic(source) else []
    for path in matches or [Path(source)]:
        if not source or not path.exists():
            raise HeadwiseError(
                f"There is no text file {source or repr(source)}.",
                "A source is builtin, mixture, packages, self, a .txt, .jsonl or .parquet file, or hf:DATASET.",
            )
        if path.is_dir():
            raise HeadwiseError(f"{path} is a folder, not a text.", f"Name its files, such as '{path}/*.jsonl'.")
        if path.suffix in _UNREAD:
            raise HeadwiseError(
                f"{path} is neither plain text nor rows of text.",
                'Make it .jsonl (objects with a "text") or .parquet.',
            )
    return matches or [Path(source)]


def _resolved_files(source: str) -> set[Path]:
    """Return the files of a source; none for a source that is not a file."""
    elsewhere = source in ("builtin", "mixture", "packages", SELF) or source.startswith("hf:")
    return set() if elsewhere else {path.resolve() for path in _files(source)}


def _read_file(path: Path) -> list[str | Chat]:
    if path.suffix == ".parquet":
        return list(stream_documents(str(path), open_stream(str(path))))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadwiseError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    if path.suffix != ".jsonl":
        return [text]
    return [
        document
        # Not `splitlines`: JSON strings may hold other separators, such as U+2028.
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
        for document in _read_line(line, f"{path}, line {number}")
    ]


def _read_line(line: str, where: str) -> list[str | Chat]:
    """Return the document of a line of JSON; none where its text is null, as in a stream."""
    try:
        row = json.loads(line)
        if row.get("messages") is not None:
            return [read_chat(row["messages"], where)]
        text = row["text"]
    except (ValueError, KeyError, AttributeError):
        raise HeadwiseError(f'{where}, is not a JSON object with a "text" or "messages".') from None
    if text is not None and not isinstance(text, str):
        raise HeadwiseError(f'{where}, has a "text" that is not a string: {json.dumps(text)[:40]}.')
    return [text] if text else []
