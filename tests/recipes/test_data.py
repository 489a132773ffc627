"""Text to blocks: the held-out modules stay held out, and the same seed gives the same blocks."""

from __future__ import annotations

import json
import sysconfig
from email.message import Message
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.demo.demo import MODEL
from headwise.errors import HeadwiseError
from headwise.recipes.settings import Data
from headwise.text import blocks as data
from headwise.text import builtin, packages, sources

LIBRARY = Path(sysconfig.get_path("stdlib"))


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def heldout_sources() -> list[str]:
    return [
        path.read_text(encoding="utf-8") for path in builtin.library_files() if builtin.is_heldout(path, LIBRARY)
    ]


def test_every_heldout_module_is_measured() -> None:
    held = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in builtin.library_files()}
    assert set(data.HELDOUT) <= held
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


def licensed(**fields: str | list[str]) -> Message:
    metadata = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            metadata[name.replace("_", "-")] = value
    return metadata


@pytest.mark.parametrize(
    ("fields", "permissive"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "Apache-2.0 OR BSD-2-Clause"}, True),
        ({"License_Expression": "MIT AND MPL-2.0"}, False),
        ({"License_Expression": "BSD-3-Clause AND Zlib", "License": "MIT"}, False),
        ({"License_Expression": "Apache-2.0 WITH LLVM-exception"}, False),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, True),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "License :: Other/Proprietary License"]}, False),
        (
            {"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "License": "MIT"},
            False,
        ),
        ({"License": "Apache 2.0 License"}, True),
        ({"License": "MPL-2.0 AND MIT"}, False),
        ({"License": "MIT or GPL"}, False),
        ({"License": "Mitsubishi proprietary"}, False),
        ({"Classifier": "Programming Language :: Python"}, False),
    ],
)
def test_only_plainly_permissive_licences_pass(fields: dict[str, Any], permissive: bool) -> None:
    assert packages.is_permissive(licensed(**fields)) is permissive


def test_packages_found_here_are_permissive_and_their_own() -> None:
    found = packages.permissive_sources()
    assert any(name.startswith("transformers ") for name in found)
    assert not any("_vendor" in path.parts for files in found.values() for path in files)


def test_blocks_are_full_and_the_same_for_the_same_seed() -> None:
    blocks = data.builtin_blocks(tokenizer(), "heldout", length=64, count=20, seed=3)
    assert blocks.shape == (20, 64) and blocks.dtype == torch.int64
    assert torch.equal(blocks, data.builtin_blocks(tokenizer(), "heldout", length=64, count=20, seed=3))
    assert not torch.equal(blocks, data.builtin_blocks(tokenizer(), "heldout", length=64, count=20, seed=4))


def test_few_blocks_see_many_documents() -> None:
    blocks = data.builtin_blocks(tokenizer(), "heldout", length=64, count=40)
    pieces = tokenizer().batch_decode(blocks)
    sources = heldout_sources()
    # A block may straddle two documents, so its first half decides whose it is.
    seen = {index for piece in pieces for index, text in enumerate(sources) if piece[: len(piece) // 2] in text}
    assert len(seen) >= 5


def test_text_and_jsonl_files(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("hello world " * 50)
    lines.write_text("".join(json.dumps({"text": f"document {i}", "id": i}) + "\n" for i in range(40)) + "\n")
    assert data.blocks_from(str(plain), tokenizer(), length=16, count=4).shape == (4, 16)
    assert sources.documents(str(lines)) == [f"document {i}" for i in range(40)]
    assert len(data.blocks_from(str(lines), tokenizer(), length=16)) >= 5


def test_bad_text_is_refused_by_name(tmp_path: Path) -> None:
    broken, binary, short = tmp_path / "b.jsonl", tmp_path / "b.txt", tmp_path / "s.txt"
    broken.write_text('{"text": "ok"}\n{"body": 1}\n')
    binary.write_bytes(b"\xff\xfe\x00\x01")
    short.write_text("few words")
    for source, message in [
        (str(tmp_path / "none.txt"), "no text file"),
        (str(broken), r"b\.jsonl, line 2"),
        (str(binary), "cannot be read as UTF-8"),
        (str(short), "holds 0 blocks of 64 tokens, 3 were asked for"),
    ]:
        with pytest.raises(HeadwiseError, match=message):
            data.blocks_from(source, tokenizer(), length=64, count=3)
    with pytest.raises(HeadwiseError, match="no split 'dev'"):
        data.builtin_blocks(tokenizer(), "dev")


def test_training_takes_each_source_as_often_as_asked_and_no_more_than_needed(tmp_path: Path) -> None:
    (tmp_path / "once.txt").write_text("alpha " * 20)
    (tmp_path / "twice.txt").write_text("beta " * 20)
    recipe = Data({str(tmp_path / "once.txt"): 1, str(tmp_path / "twice.txt"): 2}, length=4)
    blocks, read = data.training_blocks(recipe, tokenizer(), tokens=10**6)
    text = tokenizer().decode(blocks.flatten().long())
    assert 17 <= text.count("alpha") <= 20 and 36 <= text.count("beta") <= 40
    assert read[str(tmp_path / "twice.txt")] == {"documents": 1, "characters": 100, "times": 2}
    few, _ = data.training_blocks(recipe, tokenizer(), tokens=8)
    assert 8 <= few.numel() < blocks.numel()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(HeadwiseError, match="does not fill one block"):
        data.training_blocks(Data({str(tmp_path / "empty.txt"): 1}), tokenizer(), tokens=8)
