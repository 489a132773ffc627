"""Keep the answers of a model to the requests of lm-eval as they arrive, so that a killed evaluation continues.

The file has one JSON line for each answer. A line that a kill cut short is left out. Requests that are sampled at
random are asked again. lm-eval's own cache of requests is not used: it unpickles what it reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.io.workdir import append_to_file


class AnswerLog:
    """The answers of one model to the requests of all tasks.

    Args:
        folder: where every process of the evaluation has its file; made at the first answer.
        process: number of this process.
    """

    def __init__(self, folder: Path, process: int) -> None:
        self._path = folder / f"{process}.jsonl"
        self._answers: dict[str, Any] = {}
        for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, answer = json.loads(line)
                except (ValueError, TypeError):  # empty, or the end of a killed run
                    continue
                self._answers[key] = tuple(answer) if isinstance(answer, list) else answer
        self.resumed = len(self._answers)

    def add(self, request_type: str, arguments: Sequence[Any], answer: Any) -> None:
        """Append an answer.

        Args:
            request_type: of lm-eval, such as "loglikelihood".
            arguments: of the request.
            answer: of the model: a number, a pair of them, or text.
        """
        key = _key(request_type, arguments)
        if key in self._answers:
            return
        self._answers[key] = answer
        with suppress(OSError, HeadwiseError):  # a cache that cannot be written costs the resume only
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # The line before may be unfinished.
            append_to_file(self._path, f"\n{json.dumps([key, answer])}\n".encode())

    def answer(
        self, request_type: str, requests: Sequence[Any], ask: Callable[[list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """Return the answers to requests, in their order; the model gets only those without one.

        Args:
            request_type: of lm-eval.
            requests: of lm-eval.
            ask: runs requests in the model, and returns their results.
        """
        known = [None if _is_random(r) else self._answers.get(_key(request_type, r.args)) for r in requests]
        missing = [request for request, answer in zip(requests, known, strict=True) if answer is None]
        new = iter(ask(missing) if missing else ())
        return [next(new) if answer is None else answer for answer in known]


def _key(request_type: str, arguments: Sequence[Any]) -> str:
    text = json.dumps([request_type, *arguments], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_random(request: Any) -> bool:
    return any(isinstance(argument, dict) and argument.get("do_sample") for argument in request.args)
