"""Generate multiple-choice cloze tasks of code and prose from modules of the Python standard library.

The modules are the held-out ones, which no split for training or calibration contains. A question about code shows
some lines and requires the next one; a question about prose shows a docstring up to the middle of a sentence and
requires its end. The wrong choices are real lines and ends from the same module, of similar indentation and length.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from headwise.text.builtin import library_documents

NUM_CHOICES = 4
CONTEXT_CHARACTERS = 500
LINE_CHARACTERS = range(12, 100)
SENTENCE_WORDS = range(8, 40)
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][a-z ](?!.*(>>>| -- |\n +\S))", re.DOTALL)


def code_dataset(count: int = 100, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Build the data of lm-eval's task headwise_cloze_code.

    Args:
        count: most questions.
        seed: random seed of the questions.

    Returns:
        The split "test".
    """
    return {"test": _dataset(iter_code_lines, count, seed)}


def prose_dataset(count: int = 100, seed: int = 0, **_: Any) -> dict[str, Any]:
    """Build the data of lm-eval's task headwise_cloze_prose.

    Args:
        count: most questions.
        seed: random seed of the questions.

    Returns:
        The split "test".
    """
    return {"test": _dataset(iter_doc_sentences, count, seed)}


def make_cloze_questions(
    modules: list[str], parts: Callable[[str], Iterator[tuple[str, str]]], count: int, seed: int
) -> list[dict[str, Any]]:
    """Make the same number of questions from each module.

    Args:
        modules: Python source.
        parts: yields the pairs (context, true continuation) of a module, in order.
        count: most questions in all.
        seed: random seed of the questions and of the order of the choices.

    Returns:
        `{"context", "choices", "answer"}` of each question; `answer` is the index of the true continuation.
    """
    rng = random.Random(seed)
    questions = []
    for number, module in enumerate(modules):
        pairs = list(parts(module))
        ends = sorted(dict.fromkeys(end for _, end in pairs))
        share = count * (number + 1) // len(modules) - count * number // len(modules)
        for context, true in rng.sample(pairs, min(len(pairs), share)):
            similar = sorted((end for end in ends if end != true), key=lambda end: _dissimilarity(true, end))
            wrong = rng.sample(similar[: 4 * NUM_CHOICES], min(len(similar), NUM_CHOICES - 1))
            if len(wrong) < NUM_CHOICES - 1:
                continue
            choices = [true, *wrong]
            rng.shuffle(choices)
            questions.append({"context": context, "choices": choices, "answer": choices.index(true)})
    return questions


def iter_code_lines(module: str) -> Iterator[tuple[str, str]]:
    """Yield lines of code with the lines before them; no comments and no lines inside a multi-line string.

    Args:
        module: Python source.
    """
    quoted = {
        number
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.Constant) and node.end_lineno and node.end_lineno > node.lineno
        for number in range(node.lineno, node.end_lineno + 1)
    }
    before = ""
    for number, line in enumerate(module.splitlines(keepends=True), start=1):
        code = line.strip()
        if len(code) in LINE_CHARACTERS and not code.startswith("#") and number not in quoted and number > 1:
            context = before[-CONTEXT_CHARACTERS:]
            context = context[context.find("\n") + 1 :]
            # A tokenizer without a BOS token makes no token of white space that lm-eval strips.
            if context.strip():
                yield context, line.rstrip("\n")
        before += line


def iter_doc_sentences(module: str) -> Iterator[tuple[str, str]]:
    """Yield ends of sentences in docstrings with the paragraph before them; no lists and no examples.

    Args:
        module: Python source.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(module)):
        if not isinstance(node, kinds) or not (text := ast.get_docstring(node)):
            continue
        for paragraph in text.split("\n\n"):
            if not _PROSE.match(paragraph):
                continue
            before = ""
            for sentence in _SENTENCE_BREAK.split(" ".join(paragraph.split())):
                words = sentence.split(" ")
                if len(words) in SENTENCE_WORDS:
                    middle = len(words) // 2
                    context = before + " ".join(words[:middle])
                    yield context[-CONTEXT_CHARACTERS:], " " + " ".join(words[middle:])
                before += sentence + " "


def _dissimilarity(true: str, other: str) -> tuple[int, int, str]:
    return abs(_indent(true) - _indent(other)), abs(len(true) - len(other)), other


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@cache
def _dataset(parts: Callable[[str], Iterator[tuple[str, str]]], count: int, seed: int) -> Any:
    from datasets import Dataset

    return Dataset.from_list(make_cloze_questions(library_documents("heldout"), parts, count, seed))
