"""Blocks of tokens: full, and the same for the same seed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.io.source import EMBEDDED_MODEL
from headwise.text import blocks as data
from headwise.text.sources import Data, documents


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def test_blocks_are_full_and_the_same_for_the_same_seed() -> None:
    blocks = data.builtin_blocks(tokenizer(), "heldout", length=64, count=20, seed=3)
    assert blocks.shape == (20, 64) and blocks.dtype == torch.int64
    assert torch.equal(blocks, data.builtin_blocks(tokenizer(), "heldout", length=64, count=20, seed=3))
    assert not torch.equal(blocks, data.builtin_blocks(tokenizer(), "heldout", length=64, count=20, seed=4))


def test_few_blocks_see_many_documents() -> None:
    blocks = data.builtin_blocks(tokenizer(), "heldout", length=64, count=40)
    pieces = tokenizer().batch_decode(blocks)
    sources = documents("builtin", "heldout")
    # A block may straddle two documents, so its first half decides whose it is.
    seen = {index for piece in pieces for index, text in enumerate(sources) if piece[: len(piece) // 2] in text}
    assert len(seen) >= 5


def test_text_and_jsonl_files(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("hello world " * 50)
    lines.write_text("".join(json.dumps({"text": f"document {i}", "id": i}) + "\n" for i in range(40)) + "\n")
    assert data.blocks_from(str(plain), tokenizer(), length=16, count=4).shape == (4, 16)
    assert len(data.blocks_from(str(lines), tokenizer(), length=16)) >= 5


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "s.txt"
    short.write_text("few words")
    with pytest.raises(HeadwiseError, match="holds 0 blocks of 64 tokens, and 3 are needed"):
        data.blocks_from(str(short), tokenizer(), length=64, count=3)


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
