"""Pairs of source and target: padding, and files that hold them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headwise.errors import HeadwiseError, SettingError
from headwise.text.pairs import PairMarks, Pairs, encode_pairs, pad, read_pairs, require_pairs, training_pairs
from headwise.text.sources import Data


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


def words(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer: the length of each word, and 9 at the end of a source."""
    return {"input_ids": [len(word) for word in text.split()] + [9] * add_special_tokens}


def test_targets_get_the_tokens_of_the_config_and_long_sides_are_cut() -> None:
    decoder = SimpleNamespace(bos_token_id=1, pad_token_id=None, eos_token_id=[2, 3])
    assert PairMarks.of({}, decoder) == PairMarks(padding=0, start=1, end=(2,))
    assert PairMarks.of({"decoder_start_token_id": 7}, decoder).start == 7
    with pytest.raises(HeadwiseError, match="no token that starts a target"):
        PairMarks.of({}, SimpleNamespace(bos_token_id=None, pad_token_id=0, eos_token_id=None))
    pairs = encode_pairs([("a bcd", "ef"), ("a bc def ghij k", "l")], words, PairMarks(0, 1, (2,)), 4)
    assert pairs.sources.tolist() == [[1, 3, 9, 0], [1, 2, 3, 4]]
    assert pairs.targets.tolist() == [[1, 2, 2], [1, 1, 2]] and pairs.predicted.tolist() == [[True, True]] * 2
    short = pairs[0]
    assert short.trimmed().sources.tolist() == [[1, 3, 9]] and [len(row.sources) for row in (pairs[-1], short)] == [
        1,
        1,
    ]
    with pytest.raises(IndexError):
        pairs[2]


def test_a_recipe_mixes_files_of_pairs_by_their_times(tmp_path: Path) -> None:
    files = {}
    for name, number in (("once", 3), ("twice", 2)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"source": f"{'a' * (n + 1)} {name}", "target": "b"} for n in range(number)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = str(path)
    data = Data({files["once"]: 1, files["twice"]: 2}, 8)
    pairs, facts = training_pairs(data, words, PairMarks(0, 1, (2,)), count=99, seed=1)
    kinds = Counter(map(tuple, pairs.sources.tolist()))
    assert len(pairs) == 7 and kinds[(1, 5, 9)] == 2 and kinds[(1, 4, 9)] == 1
    assert facts[files["twice"]] == {"pairs": 2, "characters": 17, "times": 2}
    again, _ = training_pairs(data, words, PairMarks(0, 1, (2,)), count=4, seed=1)
    assert again.sources.tolist() == pairs.sources[:4].tolist()


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "There is no file"), ("builtin", "holds no pairs")])
def test_a_source_that_must_hold_pairs(tmp_path: Path, name: str, message: str) -> None:
    place: Any = tmp_path / name if "." in name else name
    with pytest.raises(SettingError, match=message) as caught:
        require_pairs(place, "heldout")
    assert caught.value.field == "heldout"
