"""Read the source of installed packages whose licence permits training on it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A package whose metadata names any other licence is left out.
_SPDX = re.compile(r"(MIT|MIT-0|Apache-2\.0|BSD-[234]-Clause|0BSD|PSF-2\.0|Python-2\.0|ISC)")
_CLASSIFIERS = {
    "MIT License",
    "MIT No Attribution License (MIT-0)",
    "BSD License",
    "Apache Software License",
    "Python Software Foundation License",
    "ISC License (ISCL)",
}
_FREE_TEXT = re.compile(r"(the )?(mit|((new|modified|simplified) )?bsd|apache|isc|psf)\b[a-z0-9 .,()-]*")
_VENDORED = {"_vendor", "vendor", "vendored", "_vendored", "third_party", "extern", "externals", "_distutils"}
_MAX_BYTES = 400_000  # a larger file is a table or was generated


def is_permissive(metadata: Any) -> bool:
    """Return whether a distribution's metadata names only MIT, BSD, Apache, PSF or ISC licences.

    The SPDX expression decides, else the classifiers, else a short licence field.

    Args:
        metadata: of the distribution, as importlib.metadata gives it.
    """
    expression = metadata.get("License-Expression")
    if expression:
        names = [name for name in re.split(r"[\s()]+", expression) if name not in ("AND", "OR", "")]
        return bool(names) and all(_SPDX.fullmatch(name) for name in names)
    classifiers = [
        line.rpartition("::")[2].strip()
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::") and line.strip() != "License :: OSI Approved"
    ]
    if classifiers:
        return all(name in _CLASSIFIERS for name in classifiers)
    text = (metadata.get("License") or "").strip().lower()
    return bool(len(text) < 60 and _FREE_TEXT.fullmatch(text) and not re.search(r"gpl|mpl|\b(and|or|with)\b", text))


def permissive_sources() -> dict[str, list[Path]]:
    """Return the Python files of every permissively licensed distribution, "name version" to files, sorted."""
    sources: dict[str, list[Path]] = {}
    for distribution in importlib.metadata.distributions():
        if not is_permissive(distribution.metadata):
            continue
        files = {
            Path(str(distribution.locate_file(file)))
            for file in distribution.files or []
            if file.suffix == ".py" and ".." not in file.parts and not _VENDORED & set(file.parts)
        }
        if files:
            sources[f"{distribution.metadata['Name']} {distribution.version}"] = sorted(files)
    return dict(sorted(sources.items()))


def read_all(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the files that are readable UTF-8 and not too large, with their text, in order.

    Args:
        paths: the files.
    """

    def read(path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8") if path.stat().st_size <= _MAX_BYTES else None
        except (OSError, UnicodeDecodeError):
            return None

    with ThreadPoolExecutor() as pool:
        for path, text in zip(paths, pool.map(read, paths), strict=True):
            if text and text.strip():
                yield path, text
