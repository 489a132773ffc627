"""Questions of published benchmarks, from files of either form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headwise.errors import HeadwiseError
from headwise.eval.tasks.benchmarks import local_task, read_questions

ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Roof", "ctx_a": "A man [title] sits.", "ctx_b": "he", "label": "3",
        "endings": ["a [x]", "b", "c", "d"],
    },
    "piqa": {"goal": "Go?", "sol1": "Yes", "sol2": "No", "label": 1},
    "arc_easy": {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
    "winogrande": {"sentence": "The cup fell as _ broke .", "option1": "it", "option2": "he", "answer": "2"},
    "lambada": {"text": "he said no word"},
}  # fmt: skip
EXPECTED: dict[str, dict[str, Any]] = {
    "hellaswag": {"prompt": "Roof: A man. sits. He", "choices": ["a ", "b", "c", "d"], "answer": 3},
    "piqa": {"prompt": "Question: Go?\nAnswer:", "choices": ["Yes", "No"], "answer": 1},
    "arc_easy": {"prompt": "Question: Why?\nAnswer:", "choices": ["x", "y"], "answer": 1},
    "winogrande": {"choices": ["The cup fell as it", "The cup fell as he"], "continuation": "broke .", "answer": 1},
    "lambada": {"prompt": "he said no", "answer": "word"},
}


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_question(tmp_path: Path, name: str) -> None:
    assert read_questions(name, write(tmp_path, name, ROWS[name], ROWS[name])) == [EXPECTED[name]] * 2


def test_other_forms_of_rows_are_read(tmp_path: Path) -> None:
    authors = {
        "question": {"stem": "Why?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
        "answerKey": "B",
    }
    assert read_questions("arc_easy", write(tmp_path, "arc_easy", authors)) == [EXPECTED["arc_easy"]]
    ready = {"query": "Q", "choices": ["a", "b"], "gold": 1}
    (tmp_path / "hellaswag.json").write_text(json.dumps([ready]))
    assert read_questions("hellaswag", tmp_path) == [{"prompt": "Q", "choices": ["a", "b"], "answer": 1}]


def test_a_task_of_lm_eval_reads_its_questions_from_a_folder_that_has_them(tmp_path: Path) -> None:
    write(tmp_path, "lambada", ROWS["lambada"])
    names = ["lambada_openai", "piqa", "mmlu"]
    assert [local_task(name, tmp_path) for name in names] == ["headwise_lambada", "piqa", "mmlu"]


def test_a_missing_file_and_a_wrong_row_are_named(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"no .*piqa\.jsonl"):
        read_questions("piqa", tmp_path)
    with pytest.raises(HeadwiseError, match=r"piqa\.jsonl has a row that is no question of piqa: KeyError"):
        read_questions("piqa", write(tmp_path, "piqa", {"goal": "Go?"}))
    with pytest.raises(HeadwiseError, match=r"arc_easy\.jsonl has a row that is no question of arc_easy: KeyError"):
        read_questions("arc_easy", write(tmp_path, "arc_easy", {"question": "Why?", "answerKey": "A"}))
    (tmp_path / "lambada.jsonl").write_bytes(b"\xff")
    with pytest.raises(HeadwiseError, match=r"lambada\.jsonl is not JSON"):
        read_questions("lambada", tmp_path)
    (tmp_path / "lambada.jsonl").write_text("{")
    with pytest.raises(HeadwiseError, match=r"lambada\.jsonl is not JSON"):
        read_questions("lambada", tmp_path)
