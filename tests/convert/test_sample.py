"""`sample_text`: a file of JSON lines that other verbs read, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from headwise.convert.sample import sample_text
from headwise.errors import HeadwiseError, SettingError
from headwise.io.source import EMBEDDED_MODEL
from headwise.progress import Progress
from headwise.text.blocks import blocks_from
from headwise.text.sampled import documents_of, start_token
from tests import small_parents


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_parents.parent(tmp_path_factory.mktemp("sample") / "parent")


class Counts(Progress):
    """Counts the tokens of the stage."""

    total, done = 0, 0

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.total = total or self.total

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.done += amount


def test_samples_are_text_that_other_verbs_read(parent: Path, tmp_path: Path) -> None:
    out, counts = tmp_path / "a.jsonl", Counts()
    result = sample_text(parent, out, tokens=700, seed=3, device="cpu", progress=counts)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert result.documents == len(rows) and all(set(row) == {"text"} and row["text"] for row in rows)
    assert abs(result.tokens - 700) < 300 and counts.done == counts.total == result.tokens
    blocks = blocks_from(str(out), AutoTokenizer.from_pretrained(parent), length=32, count=2)
    assert blocks.shape == (2, 32)
    again, other = tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    sample_text(parent, again, tokens=700, seed=3, device="cpu")
    sample_text(parent, other, tokens=700, seed=4, device="cpu")
    assert again.read_bytes() == out.read_bytes() != other.read_bytes()
    assert result.to_dict() == {"out": str(out), "documents": len(rows), "tokens": result.tokens, "seed": 3}


@pytest.mark.parametrize(
    ("out", "options", "sentence"),
    [
        ("there.jsonl", {}, "there.jsonl exists already"),
        ("a.txt", {}, "a.txt', which is not a path that ends with .jsonl"),
        ("no/a.jsonl", {}, "does not exist"),
        ("a.jsonl", {"tokens": 0}, "`tokens` is 0, which is not a whole number of at least 1"),
        ("a.jsonl", {"seed": -1}, "`seed` is -1"),
        ("a.jsonl", {"device": "abacus"}, "`device` is 'abacus'"),
        ("a.jsonl", {"dtype": "int8"}, "`dtype` is 'int8', which is not one of bfloat16"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path: Path, out: str, options: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "there.jsonl").write_text("kept")
    with pytest.raises(SettingError, match=sentence):
        sample_text("no/such/model", tmp_path / out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "kept"


def test_a_failure_leaves_nothing_and_force_replaces(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("old")

    def stops(*_: Any, **__: Any) -> Any:
        raise HeadwiseError("It stops.")

    with monkeypatch.context() as patched:
        patched.setattr("headwise.convert.sample.sample_tokens", stops)
        with pytest.raises(HeadwiseError, match="It stops"):
            sample_text(parent, out, tokens=64, force=True)
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    sample_text(parent, out, tokens=64, device="cpu", force=True)
    assert json.loads(out.read_text().splitlines()[0])["text"]


def test_the_precision_is_that_of_the_settings(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def sample(model: Any, *_: Any, **__: Any) -> torch.Tensor:
        used.append(model.dtype)
        return torch.tensor([[5, 6]])

    monkeypatch.setattr("headwise.convert.sample.sample_tokens", sample)
    for dtype in ("bfloat16", None):
        sample_text(parent, tmp_path / "a.jsonl", tokens=8, device="cpu", dtype=dtype, force=True)
    assert used == [torch.bfloat16, torch.float32]


def test_documents_end_where_the_model_begins_a_new_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    start = start_token(tokenizer)
    first, second = (tokenizer(text)["input_ids"] for text in ("x = 1", "é漢"))
    row = torch.tensor([start, *first, start, start, *second[:-1], start])
    cut = documents_of(row[None], tokenizer)
    assert cut[0] == "x = 1" and cut[1].startswith("é") and "\ufffd" not in cut[1] and len(cut) == 2
