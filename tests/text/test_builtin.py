"""Builtin text: the held-out modules stay held out, by name and by content."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.text import builtin, packages, sources

LIBRARY = Path(sysconfig.get_path("stdlib"))


def heldout_sources() -> list[str]:
    return [
        path.read_text(encoding="utf-8") for path in builtin.library_files() if builtin.is_heldout(path, LIBRARY)
    ]


def test_every_heldout_module_is_measured() -> None:
    held = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in builtin.library_files()}
    assert set(builtin.HELDOUT) <= held
    assert sorted(sources.documents("builtin", "heldout")) == sorted(heldout_sources())


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_no_heldout_module_is_trained_or_calibrated_on(split: str) -> None:
    documents = set(sources.documents("builtin", split))
    assert len(documents) > 100
    assert documents.isdisjoint(heldout_sources())
    joined = "\n".join(documents)
    for sign in (
        "class ArgumentParser",
        "class SequenceMatcher",
        "class TarFile",
        "class TextWrapper",
        "class ZipFile(",
    ):
        assert sign not in joined, f"{sign} is of a held-out module"


def test_heldout_docstrings_are_no_prose() -> None:
    prose = sources.documents("builtin", "prose")
    assert sum(map(len, prose)) > 100_000
    assert not any("SequenceMatcher is a flexible class" in text for text in prose)


def test_a_copy_of_a_heldout_module_is_known_by_name_and_by_text(tmp_path: Path) -> None:
    for name in (
        "vendor/argparse.py",
        "backports/tarfile/__init__.py",
        "tests/test_difflib.py",
        "zipfile/_path.py",
    ):
        assert builtin.is_heldout(tmp_path / name, tmp_path)
    assert not builtin.is_heldout(tmp_path / "csvkit/reader.py", tmp_path)
    source = (LIBRARY / "textwrap.py").read_text(encoding="utf-8")
    assert builtin.repeats_heldout("import os\n" + source)
    assert builtin.repeats_heldout(source[: len(source) // 2])
    assert not builtin.repeats_heldout((LIBRARY / "abc.py").read_text(encoding="utf-8"))


def test_copies_in_packages_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    borrowed = (LIBRARY / "textwrap.py").read_text(encoding="utf-8")
    files = {"shlex.py": "x = 1\n", "wrap.py": borrowed, "own.py": "y = 2\n", "twin.py": "y = 2\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(packages, "permissive_sources", lambda: {"a 1": [tmp_path / name for name in files]})
    assert builtin.package_documents() == ["y = 2\n"]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(HeadwiseError, match="no split 'dev'"):
        builtin.library_documents("dev")
