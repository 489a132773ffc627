"""The installed packages whose licence lets anyone train on their source, as text."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A package whose metadata names any licence beside these is left out: no judgement calls, no copyleft.
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
_SOMEONE_ELSES = {"_vendor", "vendor", "vendored", "_vendored", "third_party", "extern", "externals", "_distutils"}
_MOST_BYTES = 400_000  # beyond it a file is a table or was generated


def is_permissive(metadata: Any) -> bool:
    """Whether a distribution's metadata names only MIT, BSD, Apache, PSF or ISC licences.

    The SPDX expression decides, else the classifiers, else a short licence field.
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
    """Every permissively licensed distribution that holds Python files, "name version" to those files, sorted."""
    found: dict[str, list[Path]] = {}
    for distribution in importlib.metadata.distributions():
        if not is_permissive(distribution.metadata):
            continue
        files = {
            Path(str(distribution.locate_file(file)))
            for file in distribution.files or []
            if file.suffix == ".py" and ".." not in file.parts and not _SOMEONE_ELSES & set(file.parts)
        }
        if files:
            found[f"{distribution.metadata['Name']} {distribution.version}"] = sorted(files)
    return dict(sorted(found.items()))


def read_all(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """The readable, UTF-8, not overlong ones among `paths` with their text, in their order."""

    def read(path: Path) -> str | None:
        try:
            return path.read_text(encoding="utf-8") if path.stat().st_size <= _MOST_BYTES else None
        except (OSError, UnicodeDecodeError):
            return None

    with ThreadPoolExecutor() as pool:
        for path, text in zip(paths, pool.map(read, paths), strict=True):
            if text and text.strip():
                yield path, text
