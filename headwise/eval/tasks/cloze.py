"""Multiple-choice cloze of code and prose, made at run time from modules of the machine's own Python library.

The modules are the held-out ones, which no split that trains or calibrates contains. A question about code shows
some lines and asks for the next; one about prose shows a docstring up to the middle of a sentence and asks for its
end. The wrong answers are real lines and ends from the same module, alike in indentation and length, so that only
their fit tells them apart.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from headwise.text.builtin import library_documents

CHOICES = 4
CONTEXT_CHARACTERS = 500
LINE_CHARACTERS = range(12, 100)
SENTENCE_WORDS = range(8, 40)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][a-z ](?!.*(>>>| -- |\n +\S))", re.DOTALL)


def code(count: int = 100, seed: int = 0, **_: Any) -> dict[str, Any]:
    """The data of lm-eval's task headwise_cloze_code."""
    return {"test": _dataset(questions(library_documents("heldout"), lines, count, seed))}


def prose(count: int = 100, seed: int = 0, **_: Any) -> dict[str, Any]:
    """The data of lm-eval's task headwise_cloze_prose."""
    return {"test": _dataset(questions(library_documents("heldout"), sentences, count, seed))}


def questions(
    modules: list[str], parts: Callable[[str], Iterator[tuple[str, str]]], count: int, seed: int
) -> list[dict[str, Any]]:
    """As many questions from each module.

    Args:
        modules: Python source.
        parts: gives (context, its true continuation) of a module, in order.
        count: how many in all, at most.
        seed: of what is asked and of the order of the choices.

    Returns:
        `{"context", "choices", "answer"}` each; `answer` is the place of the true continuation.
    """
    rng = random.Random(seed)
    found = []
    for number, module in enumerate(modules):
        pairs = list(parts(module))
        ends = sorted(dict.fromkeys(end for _, end in pairs))
        own = count * (number + 1) // len(modules) - count * number // len(modules)
        for context, true in rng.sample(pairs, min(len(pairs), own)):
            alike = sorted((other for other in ends if other != true), key=lambda end: _unlike(true, end))
            wrong = rng.sample(alike[: 4 * CHOICES], min(len(alike), CHOICES - 1))
            if len(wrong) < CHOICES - 1:
                continue
            choices = [true, *wrong]
            rng.shuffle(choices)
            found.append({"context": context, "choices": choices, "answer": choices.index(true)})
    return found


def lines(module: str) -> Iterator[tuple[str, str]]:
    """Lines of code with those before them; no comments, and nothing inside a string of several lines."""
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
            yield context[context.find("\n") + 1 :], line.rstrip("\n")
        before += line


def sentences(module: str) -> Iterator[tuple[str, str]]:
    """Ends of sentences in docstrings, with what is before them in their paragraph; no lists and no examples."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(module)):
        if not isinstance(node, kinds) or not (text := ast.get_docstring(node)):
            continue
        for paragraph in text.split("\n\n"):
            if not _PROSE.match(paragraph):
                continue
            before = ""
            for sentence in _SENTENCE.split(" ".join(paragraph.split())):
                words = sentence.split(" ")
                if len(words) in SENTENCE_WORDS:
                    middle = len(words) // 2
                    context = before + " ".join(words[:middle])
                    yield context[-CONTEXT_CHARACTERS:], " " + " ".join(words[middle:])
                before += sentence + " "


def _unlike(true: str, other: str) -> tuple[int, int, str]:
    return abs(_indent(true) - _indent(other)), abs(len(true) - len(other)), other


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _dataset(found: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(found)
