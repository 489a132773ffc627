"""Provide text that needs no download: the running Python's standard library, and the packages installed with it.

The modules in `HELDOUT` are for measuring only; no other split contains them, nor text copied from them.
"""

from __future__ import annotations

import ast
import functools
import os
import sysconfig
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.text import packages

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

# Folders that are not source of the library: other packages, tests, tables, and the language reference.
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


def library_documents(split: str) -> list[str]:
    """Return the texts of a split of the standard library, in a fixed order.

    Args:
        split: one of SPLITS.

    Raises:
        HeadwiseError: there is no such split, or this Python has no readable library.
    """
    if split not in SPLITS:
        raise HeadwiseError(f"There is no split {split!r} of the builtin text.", f"There are: {', '.join(SPLITS)}.")
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


def library_files() -> list[Path]:
    """Return the Python files of the running standard library, held-out modules included, sorted.

    Raises:
        HeadwiseError: this Python has no readable library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inside, names in os.walk(root):
        # Skipped without a look inside: an environment may have a hundred thousand files in site-packages.
        inside[:] = [name for name in inside if name not in _NOT_SOURCE]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise HeadwiseError(
            f"This Python has no readable standard library in {root}.",
            "Give a text file instead of builtin.",
        )
    return sorted(files)


def is_heldout(path: Path, root: Path) -> bool:
    """Return whether a file is a held-out module, or by its name a test or a copy of one.

    Args:
        path: the file.
        root: the folder that names are relative to.
    """
    names = {part.removesuffix(".py").removeprefix("test_") for part in path.relative_to(root).parts}
    return not names.isdisjoint(HELDOUT)


def repeats_heldout(text: str) -> bool:
    """Return whether a tenth of a text's longer lines, and at least ten of them, occur in a held-out module.

    Args:
        text: a document.
    """
    lines = _long_lines(text)
    shared = len(lines & _heldout_lines())
    return shared >= 10 and shared * 10 >= len(lines)


def package_documents() -> list[str]:
    """Return the Python files of the permissively licensed packages here, without copies of held-out modules."""
    root = Path(sysconfig.get_path("purelib"))
    paths = [
        path
        for files in packages.permissive_sources().values()
        for path in files
        if not is_heldout(path, root if path.is_relative_to(root) else path.parent)
    ]
    texts = dict.fromkeys(text for _, text in packages.read_all(paths))
    return [text for text in texts if not repeats_heldout(text)]


def _topics() -> list[str]:
    """Return the language reference of `help()`."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return []
    return [text for _, text in sorted(topics.items())]


def _docstrings(source: str) -> str:
    """Return the longer docstrings of a module, one after another."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in docstrings if len(text) >= 200)


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 30}


@functools.cache
def _heldout_lines() -> set[str]:
    return set().union(*map(_long_lines, library_documents("heldout")))
