"""Text to blocks of tokens: for calibration, training and measurement, deterministic by seed.

`builtin` needs no download: it is the standard library of the Python that runs, and the prose in it. The
modules in `HELDOUT` are for measuring only; no other split contains them, nor text copied from them.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.recipes import packages
from headwise.recipes.schema import Data

HELDOUT = (
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "mailbox",
    "shlex",
    "statistics",
    "tarfile",
    "textwrap",
    "zipfile",
)
SPLITS = ("train", "calibration", "heldout", "prose")

# Installed beside the library but not of it, tests, tables, and the prose that is read on its own.
_NOT_SOURCE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "_bundled",
    "encodings",
    "pydoc_data",
}


def builtin_blocks(
    tokenizer: Any, split: str = "calibration", length: int = 1024, count: int | None = None, seed: int = 0
) -> Tensor:
    """Blocks of the builtin text, int64 (count, length); see `blocks_from`."""
    return blocks_from("builtin", tokenizer, split=split, length=length, count=count, seed=seed)


def blocks_from(
    source: str,
    tokenizer: Any,
    *,
    split: str = "calibration",
    length: int = 1024,
    count: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Tokens of a text source, packed into blocks.

    Documents follow one another with the tokenizer's end-of-text token between them, and are cut wherever a
    block is full. Where the tokenizer begins a text with a BOS token, so does every block.

    Args:
        source: `builtin`, `packages`, a text file, a `.jsonl` file with a "text" in each line, or `hf:DATASET`.
        split: of `builtin`: `train` and `calibration` (library source and its prose, in different orders),
            `heldout` (the modules in HELDOUT), `prose` (language reference and docstrings).
        count: how many blocks, drawn over the whole source by `seed`. None: all there are, in order.

    Returns:
        int64 (count, length).

    Raises:
        HeadwiseError: unknown source or split, unreadable file, less text than asked for.
    """
    wanted = None if count is None else count * length
    texts = documents(source, split, characters=None if wanted is None else 16 * wanted)
    if wanted is not None:
        # One long file would fill many blocks: draw pieces instead, so that few blocks still see much variety.
        texts = [piece for text in texts for piece in _pieces(text, 16 * length)]
        random.Random(f"{split} {seed}").shuffle(texts)
    encoded = _until(encode(texts, tokenizer, batch=1024 if wanted is None else 16), wanted)
    blocks = pack(encoded, length, begin=_begin(tokenizer))[:count]
    if len(blocks) < (count or 1):
        raise HeadwiseError(
            f"{source} holds {len(blocks)} blocks of {length} tokens, {count or 1} were asked for.",
            "Ask for fewer or shorter blocks, or give more text.",
        )
    return blocks.long()


def training_blocks(
    data: Data, tokenizer: Any, tokens: int, seed: int = 0
) -> tuple[Tensor, dict[str, dict[str, int]]]:
    """Whole documents in random order, packed: one pass over a recipe's text, or as much as holds `tokens`.

    Returns:
        int32 (blocks, length), and for each source the documents and characters in it and its times per pass.
    """
    texts: list[str] = []
    sources = {}
    for source, times in data.text.items():
        found = documents(source, "train")
        sources[source] = {"documents": len(found), "characters": sum(map(len, found)), "times": times}
        texts += found * times
    random.Random(f"train {seed}").shuffle(texts)
    blocks = pack(_until(encode(texts, tokenizer), tokens), data.length, begin=_begin(tokenizer))
    if not len(blocks):
        named = ", ".join(data.text) or "none given"
        raise HeadwiseError(f"The recipe's text ({named}) does not fill one block of {data.length} tokens.")
    return blocks, sources


def documents(source: str, split: str = "train", characters: int | None = None) -> list[str]:
    """The texts of a source, in a fixed order. `characters` bounds what is streamed from the Hub."""
    if split not in SPLITS:
        raise HeadwiseError(f"There is no split {split!r} of the builtin text.", f"There are: {', '.join(SPLITS)}.")
    if source == "builtin":
        return _builtin(split)
    if source == "packages":
        return package_documents()
    if source.startswith("hf:"):
        return _hub(source.removeprefix("hf:"), characters)
    return _file(Path(source))


def library_files() -> list[Path]:
    """The Python files of the running standard library, held-out modules included, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inside, names in os.walk(root):
        # Not even entered: an environment may have a hundred thousand files in site-packages.
        inside[:] = [name for name in inside if name not in _NOT_SOURCE]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise HeadwiseError(
            f"This Python keeps no readable standard library in {root}.",
            "Give text of your own instead of builtin.",
        )
    return sorted(files)


def is_heldout(path: Path, root: Path) -> bool:
    """Whether a file is one of the held-out modules, or by its name a test or a copy of one."""
    names = {part.removesuffix(".py").removeprefix("test_") for part in path.relative_to(root).parts}
    return not names.isdisjoint(HELDOUT)


def repeats_heldout(text: str) -> bool:
    """Whether a tenth of a text's longer lines (and at least ten of them) stand in a held-out module too."""
    lines = _long_lines(text)
    shared = len(lines & _heldout_lines())
    return shared >= 10 and shared * 10 >= len(lines)


def package_documents() -> list[str]:
    """The Python files of the permissively licensed packages installed here, without copies of held-out modules."""
    root = Path(sysconfig.get_path("purelib"))
    paths = [
        path
        for files in packages.permissive_sources().values()
        for path in files
        if not is_heldout(path, root if path.is_relative_to(root) else path.parent)
    ]
    texts = dict.fromkeys(text for _, text in packages.read_all(paths))
    return [text for text in texts if not repeats_heldout(text)]


def encode(texts: Iterable[str], tokenizer: Any, batch: int = 1024) -> Iterator[np.ndarray]:
    """Each text's tokens and an end-of-text token after them, int32; `batch` texts go to the tokenizer at once."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    end = next((token for token in ends if token is not None), None)
    if end is None:
        raise HeadwiseError("The tokenizer has no end-of-text token to put between documents.")
    texts = iter(texts)
    while chunk := list(islice(texts, batch)):
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        for tokens in tokenizer(chunk, **options)["input_ids"]:
            yield np.array([*tokens, end], dtype=np.int32)


def _until(encoded: Iterator[np.ndarray], tokens: int | None) -> list[np.ndarray]:
    """As many documents as hold that many tokens (None: all)."""
    taken: list[np.ndarray] = []
    for document in encoded:
        taken.append(document)
        if tokens is not None:
            tokens -= len(document)
            if tokens <= 0:
                break
    return taken


def pack(encoded: Sequence[np.ndarray], length: int, begin: int | None = None) -> Tensor:
    """Documents one after another, cut into rows: int32 (blocks, length); what does not fill a row is dropped.

    `begin` is put before each row (which then holds one token of text less).
    """
    own = length - (begin is not None)
    stream = np.concatenate(encoded) if len(encoded) else np.zeros(0, dtype=np.int32)
    rows = torch.from_numpy(stream[: len(stream) // own * own].reshape(-1, own))
    if begin is None:
        return rows
    return torch.cat([torch.full((len(rows), 1), begin, dtype=rows.dtype), rows], dim=1)


def _begin(tokenizer: Any) -> int | None:
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _builtin(split: str) -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = library_files()
    if split == "heldout":
        return [text for _, text in packages.read_all([path for path in files if is_heldout(path, root)])]
    sources = [
        text
        for _, text in packages.read_all([path for path in files if not is_heldout(path, root)])
        if not repeats_heldout(text)
    ]
    if split == "prose":
        return _topics() + [text for text in map(_docstrings, sources) if text]
    return sources + _topics()


def _topics() -> list[str]:
    """The language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    return [text for _, text in sorted(topics.items())]


def _docstrings(source: str) -> str:
    """The longer docstrings of one module, one after another."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) >= 200)


def _file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HeadwiseError(
            f"There is no text file {path}.", "A source is builtin, packages, a .txt or .jsonl file, or hf:DATASET."
        ) from None
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


def _hub(name: str, characters: int | None) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise HeadwiseError("hf: text needs the datasets package.", "pip install 'headwise[train]'") from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        texts: list[str] = []
        read = 0
        for row in rows:
            texts.append(row["text"])
            read += len(row["text"])
            if characters is not None and read >= characters:
                break
    except KeyError:
        raise HeadwiseError(f'The data set {name} has no "text" column.') from None
    except Exception as error:  # the Hub's own errors are many and their messages good
        raise HeadwiseError(f"The data set {name} cannot be read: {error}") from error
    return texts


def _pieces(text: str, characters: int) -> list[str]:
    """A text cut at line ends into pieces of about that many characters."""
    pieces, start = [], 0
    while len(text) - start > characters:
        end = text.find("\n", start + characters) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:] else pieces


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 30}


@functools.cache
def _heldout_lines() -> set[str]:
    return set().union(*map(_long_lines, _builtin("heldout")))
