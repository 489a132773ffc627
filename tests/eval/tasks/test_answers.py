"""Counts of answers that are not finite and of prompts that are cut."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headwise.eval.tasks.answers import AnswerCounts, count_answers, read_counts, write_counts

LM = SimpleNamespace(max_length=6, max_gen_toks=4, tok_encode=lambda text: text.split())


def sample(number: int, arguments: list[Any], resps: list[Any]) -> dict[str, Any]:
    return {"doc_id": number, "doc_hash": str(number), "prompt_hash": "p", "arguments": arguments, "resps": resps}


def test_answers_that_are_not_finite_count_once_for_each_question() -> None:
    choices = [("a", " b"), ("a", " c")]
    good, nan = [[(-1.5, True)], [(-2.0, False)]], [[(float("nan"), True)], [(float("-inf"), False)]]
    samples = [sample(0, choices, good), sample(1, choices, nan), sample(1, choices, nan)]
    assert count_answers(samples, LM) == AnswerCounts(questions=2, cut=(), not_finite=1)


def test_prompts_beyond_the_context_are_cut(tmp_path: Path) -> None:
    words = "one two three four five six"
    samples = [
        sample(0, [(words, " seven")], [[(-1.0, True)]]),  # seven tokens: six are read, the last is predicted
        sample(1, [("one", " two"), (words, " seven eight")], [[(-1.0, True)]]),
        sample(2, [("one two", {"until": ["."]})], [["nan"]]),
        sample(3, [("one two three", {"until": ["."]})], [["nan"]]),
        sample(4, [("one two three", {"max_gen_toks": 3})], [["nan"]]),
        sample(5, [(f"{words} {words}",)], [[-3.0]]),
    ]
    counts = {"task": count_answers(samples, LM)}
    assert counts["task"] == AnswerCounts(questions=6, cut=("1p", "3p"), not_finite=0)
    write_counts(counts, tmp_path)
    assert read_counts(tmp_path) == counts and read_counts(tmp_path / "none") == {}
