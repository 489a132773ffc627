"""Sources: documents of text files and rows; the text section of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwise.errors import HeadwiseError, SettingError
from headwise.text import sources
from headwise.text.sources import Data


def test_text_and_jsonl_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": f"document {i}", "id": i}) + "\n" for i in range(40)) + "\n")
    assert sources.documents(str(lines)) == [f"document {i}" for i in range(40)]
    (tmp_path / "a.txt").write_text("hello world\n")
    assert sources.documents(str(tmp_path / "a.txt")) == ["hello world\n"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path: Path, separator: str) -> None:
    lines, texts = tmp_path / "a.jsonl", [f"one{separator}two", "three"]
    rows = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    lines.write_bytes(rows.encode())
    assert sources.documents(str(lines)) == texts


def test_a_text_is_a_string_or_null(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n{"text": null}\n{"text": "b", "messages": null}\n')
    assert sources.documents(str(lines)) == ["a", "b"]
    for wrong in ('["a"]', "42", '{"a": "b"}', "true"):
        lines.write_text('{"text": "a"}\n{"text": ' + wrong + "}\n")
        with pytest.raises(HeadwiseError, match=r'a\.jsonl, line 2, has a "text" that is not a string: '):
            sources.documents(str(lines))
    lines.write_text('"a"\n')
    with pytest.raises(HeadwiseError, match="line 1, is not a JSON object"):
        sources.documents(str(lines))


def test_bad_text_is_refused_by_name(tmp_path: Path) -> None:
    broken, binary = tmp_path / "b.jsonl", tmp_path / "b.txt"
    broken.write_text('{"text": "ok"}\n{"body": 1}\n')
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for source, message in [
        (str(tmp_path / "none.txt"), "no text file"),
        (str(broken), r"b\.jsonl, line 2"),
        (str(binary), "cannot be read as UTF-8"),
        (str(tmp_path), "is a folder"),
    ]:
        with pytest.raises(HeadwiseError, match=message):
            sources.documents(source)


def test_overlap_is_found_through_patterns(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    a, both = str(tmp_path / "a.txt"), str(tmp_path / "*.txt")
    assert sources.overlapping(a, ["builtin", both]) == both
    assert sources.overlapping(a, [str(tmp_path / "b.txt")]) is None
    assert sources.overlapping("builtin", ["builtin"]) is None
    assert sources.overlapping("packages", ["packages"]) == "packages"


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"text": "builtin"}, "text", "`text` is 'builtin', which is not a mapping"),
        ({"text": {"builtin": 0}}, "text.builtin", "`text.builtin` is 0, which is not a whole"),
        ({"length": 1}, "length", "`length` is 1, which is not a whole number of at least 2"),
        ({"heldout": ""}, "heldout", "`heldout` is '', which is not a text"),
        ({"heldout_blocks": 0}, "heldout_blocks", "`heldout_blocks` is 0"),
        ({"separate_documents": 1.5}, "separate_documents", "not True or False"),
    ],
)
def test_a_wrong_value_is_named(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as refused:
        Data(**{"text": {"builtin": 1}, **fields})
    assert refused.value.field == field


def test_all_heldout_blocks_can_be_asked_for() -> None:
    assert Data({"builtin": 1}, heldout_blocks=None).heldout_blocks is None
