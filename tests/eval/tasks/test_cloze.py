"""Cloze questions from Python source."""

import pytest

from headwise.eval.tasks.cloze import iter_code_lines, make_cloze_questions

MODULE = '''"""One line."""

import heapq
from typing import Any


def smallest(values: Any) -> int:
    return heapq.heappop(values)
'''


def test_every_context_has_text() -> None:
    # lm-eval strips white space, and a tokenizer without BOS then has no token to begin with.
    pairs = list(iter_code_lines(MODULE))
    assert [line for _, line in pairs] == [
        "from typing import Any",
        "def smallest(values: Any) -> int:",
        "    return heapq.heappop(values)",
    ]
    assert all(context.strip() for context, _ in pairs)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_question_has_its_line_among_four_choices(seed: int) -> None:
    module = "import heapq\n" + "".join(f"number_{i} = heapq.nlargest({i}, values)\n" for i in range(9))
    for question in make_cloze_questions([module], iter_code_lines, 5, seed):
        assert len(set(question["choices"])) == 4
        true = question["choices"][question["answer"]]
        assert module.split(true)[0].endswith(question["context"])
