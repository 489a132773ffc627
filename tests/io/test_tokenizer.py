"""The kind of a vocabulary, from the files of a folder alone, and a folder without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from headwise.errors import HeadwiseError
from headwise.io.source import EMBEDDED_MODEL
from headwise.io.tokenizer import load_tokenizer, tokenizer_kind

BYTES = {"type": "ByteLevel", "add_prefix_space": False}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": {"type": "BPE"}, "pre_tokenizer": BYTES}, "bpe"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES]}}, "bpe"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "sentencepiece"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}}, "other"),
        ({"model": {"type": "Unigram"}}, "other"),
        ({"model": 7}, "other"),
        ([], "unreadable"),
    ],
)
def test_tokenizer_json(tmp_path: Path, fields: Any, kind: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert tokenizer_kind(tmp_path) == kind


def test_folders_without_tokenizer_json(tmp_path: Path) -> None:
    assert tokenizer_kind(tmp_path) == "none"
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    assert tokenizer_kind(tmp_path) == "sentencepiece"


def test_a_folder_without_a_vocabulary_is_named_in_one_sentence(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, tmp_path / name)
    with pytest.raises(HeadwiseError, match=r"model has no tokenizer .*: there is no tokenizer\.json\.") as refused:
        load_tokenizer(tmp_path, "model")
    assert refused.value.hint == "Add the tokenizer's files to the folder."


def test_the_embedded_model() -> None:
    assert tokenizer_kind(Path(EMBEDDED_MODEL)) == "bpe of the embedded model"


def test_a_known_vocabulary_is_known_in_either_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = json.loads((Path(EMBEDDED_MODEL) / "tokenizer.json").read_text("utf-8"))
    fields["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in fields["model"]["merges"]
    ]
    fields["model"]["vocab"] = dict(reversed(fields["model"]["vocab"].items()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert tokenizer_kind(tmp_path) == "bpe of the embedded model"
    fields["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert tokenizer_kind(tmp_path) == "bpe"
    fields["model"].pop("merges")
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert tokenizer_kind(tmp_path) == "bpe"
