"""Pairs of source and target: padding, and files that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.text.pairs import Pairs, pad, read_pairs


def test_rows_are_cut_or_padded_on_the_right() -> None:
    ids, mask = pad([[5, 6, 7, 8], [9], []], 3, padding=1)
    assert ids.tolist() == [[5, 6, 7], [9, 1, 1], [1, 1, 1]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    inputs = Pairs(ids, mask, ids, mask)[1:2].model_inputs()
    assert inputs["input_ids"].tolist() == [[9, 1, 1]]
    assert inputs["decoder_attention_mask"].tolist() == [[1, 0, 0]]


def test_a_file_of_pairs_is_read_and_other_text_is_not(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"source": "one\u2028line", "target": "1"}, {"source": "two", "target": "2", "id": 7}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_pairs(path) == [("one\u2028line", "1"), ("two", "2")]
    path.write_text(json.dumps({"text": "prose"}) + "\n")
    assert read_pairs(path) is None
    assert read_pairs(tmp_path / "none.jsonl") is None and read_pairs("mixture") is None


@pytest.mark.parametrize(
    "line", ['{"source": "two"}', '{"source": "two", "target": 2}', "two", '{"source": "", "target": "2"}']
)
def test_a_line_without_a_pair_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "one", "target": "1"}\n' + line + "\n")
    with pytest.raises(HeadwiseError, match="line 2, is no pair"):
        read_pairs(path)
