"""Count the answers that are not finite numbers, and the prompts that a model's context cuts.

lm-eval counts both as ordinary answers: of log-likelihoods that are NaN it takes the first choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise.io.workdir import write_file_atomically

FILE = "answers.json"


@dataclass(frozen=True)
class AnswerCounts:
    """The answers of one model to one task.

    Attributes:
        questions: number of questions.
        cut: keys of the questions with a prompt that was cut from the left, because it exceeds the model's context.
        not_finite: questions with a log-likelihood that is NaN or infinite.
    """

    questions: int
    cut: tuple[str, ...]
    not_finite: int


def count_answers(samples: Sequence[Mapping[str, Any]], lm: Any) -> AnswerCounts:
    """Count the answers of a model to one task.

    Args:
        samples: as lm-eval logs them; one question may occur once for each filter.
        lm: the model of lm-eval, with the length of its context and its tokenizer.
    """
    questions = {sample["doc_id"]: sample for sample in samples}.values()
    cut = (sample for sample in questions if any(_is_cut(arguments, lm) for arguments in sample["arguments"]))
    not_finite = sum(not all(map(math.isfinite, _numbers(sample["resps"]))) for sample in questions)
    return AnswerCounts(len(questions), tuple(map(question_key, cut)), not_finite)


def write_counts(counts: Mapping[str, AnswerCounts], folder: Path) -> None:
    """Write the counts of a model's tasks beside lm-eval's files.

    Args:
        counts: task -> counts.
        folder: the folder.
    """
    content = {task: asdict(each) for task, each in counts.items()}
    write_file_atomically(folder / FILE, json.dumps(content).encode())


def read_counts(folder: Path) -> dict[str, AnswerCounts]:
    """Return the counts that a folder holds; none where an earlier version wrote it.

    Args:
        folder: the folder with lm-eval's files.
    """
    if not (folder / FILE).is_file():
        return {}
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return {task: AnswerCounts(**each | {"cut": tuple(each["cut"])}) for task, each in content.items()}


def question_key(sample: Mapping[str, Any]) -> str:
    """Return what names a question with its prompt, in the samples of every model.

    Args:
        sample: as lm-eval logs it.
    """
    return str(sample["doc_hash"]) + str(sample["prompt_hash"])


def _is_cut(arguments: Sequence[Any], lm: Any) -> bool:
    """Return whether the prompt of one request, with its continuation, exceeds the context of the model."""
    longest: int | None = getattr(lm, "max_length", None)
    if longest is None or len(arguments) < 2:  # the windows of a whole document are not cut
        return False
    text, continuation = arguments[:2]
    if isinstance(continuation, str):
        text, longest = text + continuation, longest + 1  # the last token is predicted and not read
    elif isinstance(continuation, Mapping):
        longest -= int(continuation.get("max_gen_toks", getattr(lm, "max_gen_toks", 0)))
    # No token is shorter than a byte.
    return len(str(text).encode()) > longest and len(lm.tok_encode(str(text))) > longest


def _numbers(answers: Any) -> Iterator[float]:
    if isinstance(answers, list | tuple):
        for answer in answers:
            yield from _numbers(answer)
    elif isinstance(answers, float):
        yield answers
