"""Text that is read as training goes: from every kind of source, and from where it was left."""

from __future__ import annotations

import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from headwise.errors import HeadwiseError
from headwise.io.source import EMBEDDED_MODEL
from headwise.text import blocks as data
from headwise.text import sources
from headwise.text.marks import tokens_of
from headwise.text.sources import Data
from headwise.text.stream import Stream

datasets = pytest.importorskip("datasets")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A data set as it lies on the Hub: a folder of files, here three of 40 documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for shard in range(3):
        lines = (json.dumps({"text": f"shard {shard} document {i}\n" * (1 + i % 5), "id": i}) for i in range(40))
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def rows(stream: Stream, count: int) -> torch.Tensor:
    return torch.stack(list(islice(stream, count)))


def test_parquet_hub_and_several_files_hold_the_same_text(shards: Path, tmp_path: Path) -> None:
    expected = sources.documents(str(shards / "*.jsonl"))
    assert len(expected) == 120 and expected[0] == "shard 0 document 0\n"
    datasets.Dataset.from_dict({"text": expected, "n": list(range(120))}).to_parquet(tmp_path / "a.parquet")
    assert sources.documents(str(tmp_path / "a.parquet")) == expected
    assert sources.documents(f"hf:{shards}") == expected
    assert len(sources.documents(f"hf:{shards}", characters=100)) < 10
    assert data.blocks_from(f"hf:{shards}", tokenizer(), length=16, count=4).shape == (4, 16)


def test_only_what_is_long_is_streamed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = {f"hf:{shards}": True, str(shards / "*.jsonl"): False, "builtin": False, "packages": False}
    assert {source: sources.is_streamed(source) for source in everywhere} == everywhere
    monkeypatch.setattr(sources, "STREAM_BYTES", 100)
    assert sources.is_streamed(str(shards / "*.jsonl"))
    made, read = data.training_blocks(Data({str(shards / "*.jsonl"): 1}, length=16), tokenizer(), tokens=64)
    assert isinstance(made, Stream) and read == {str(shards / "*.jsonl"): {"times": 1}}
    assert rows(made, 3).shape == (3, 16)


def test_a_stream_is_the_same_for_the_same_seed_and_sees_every_document(shards: Path) -> None:
    def stream(seed: int) -> Stream:
        return Stream({f"hf:{shards}": 1}, tokenizer(), 32, seed, characters=1000)

    whole = rows(stream(0), 150)
    assert whole.dtype == torch.int32
    assert torch.equal(whole, rows(stream(0), 150))
    assert not torch.equal(whole[:20], rows(stream(1), 20))
    text = tokenizer().decode(tokens_of(whole).flatten().long())
    # A window's last row is dropped where it is not full, so the odd document is cut, none is missing.
    assert all(f"shard {s} document {i}\n" in text for s in range(3) for i in range(40) if i % 5)


@pytest.mark.parametrize("seen", [0, 1, 7, 100, 260])
def test_a_stream_goes_on_at_the_row_where_it_was_left(shards: Path, seen: int) -> None:
    text = {f"hf:{shards}": 2.0, str(shards / "part-1.jsonl"): 1.0}
    first = Stream(text, tokenizer(), 32, 3, characters=1000)
    whole = rows(first, 300)  # two passes and more
    ahead = iter(first)
    for _ in range(seen + 5):  # a loader has read further than was trained on
        next(ahead)
    state = json.loads(json.dumps(first.state_dict(seen)))

    again = Stream(text, tokenizer(), 32, 3, characters=1000)
    again.load_state_dict(state)
    assert torch.equal(rows(again, 300 - seen), whole[seen:])
    # And once more from there: positions are counted from the beginning of the run.
    third = Stream(text, tokenizer(), 32, 3, characters=1000)
    third.load_state_dict(json.loads(json.dumps(again.state_dict(seen + 20))))
    assert torch.equal(rows(third, 5), whole[seen + 20 : seen + 25])


def test_bad_streams_are_refused_by_name(tmp_path: Path) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    for folder, line in ((empty, '{"text": ""}'), (other, '{"body": "x"}')):
        folder.mkdir()
        (folder / "a.jsonl").write_text(line + "\n")
    with pytest.raises(HeadwiseError, match=r"empty.* does not fill one row of 16 tokens"):
        rows(Stream({f"hf:{empty}": 1}, tokenizer(), 16), 1)
    with pytest.raises(HeadwiseError, match=r'other has no "text" or "messages" column'):
        sources.documents(f"hf:{other}")
    with pytest.raises(HeadwiseError, match="cannot be read"):
        sources.documents(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(HeadwiseError, match="no text file"):
        sources.documents(str(tmp_path / "*.parquet"))
