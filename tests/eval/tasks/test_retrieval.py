"""The generated long-context tasks: length, order and answer of their documents."""

from __future__ import annotations

import re
from typing import Any

import pytest

from headwise.errors import HeadwiseError
from headwise.eval.tasks.retrieval import key_question, make_documents, variable_question, word_question


def by_words(text: str, **_: Any) -> dict[str, list[str]]:
    return {"input_ids": text.split()}


def solve(prompt: str) -> str:
    """Return the answer that a reader of the whole prompt gives."""
    if name := re.search(r"pass key of (\w+)\?", prompt):
        return re.search(rf"The pass key of {name[1]} is (\d+)\.", prompt)[1]  # type: ignore[index]
    if last := re.search(r"value of variable (\w)\?", prompt):
        values: dict[str, str] = {}
        for new, value, old in re.findall(r"Variable (\w) (?:is (\d+)|equals variable (\w))\.", prompt):
            values[new] = value or values[old]  # facts stand in their order
        return values[last[1]]
    words = re.findall(r"The word is (\w+)\.", prompt)
    return max(set(words), key=words.count)


@pytest.mark.parametrize("ask", [key_question, variable_question, word_question])
def test_documents_fit_and_can_be_solved(ask: Any) -> None:
    documents = make_documents(ask, by_words, lengths=(5, 200, 401), samples=3, seed=7)
    assert [document["length"] for document in documents] == [200] * 3 + [401] * 3, "5 tokens hold no question"
    for document in documents:
        assert solve(document["prompt"]) == document["answer"]
        tokens = len(f"{document['prompt']} {document['answer']}".split())
        assert document["length"] - 30 < tokens <= document["length"]
    assert documents == make_documents(ask, by_words, lengths=(5, 200, 401), samples=3, seed=7)
    assert documents[0]["prompt"] != documents[1]["prompt"]


def test_a_length_for_no_question_is_refused() -> None:
    with pytest.raises(HeadwiseError, match="too short"):
        make_documents(key_question, by_words, lengths=(9,), samples=1)
