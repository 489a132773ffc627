"""Answers to requests of an interrupted run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headwise.eval.tasks.resume import AnswerLog


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_only_requests_without_an_answer_are_asked(tmp_path: Path) -> None:
    first = AnswerLog(tmp_path, 0)
    assert first.resumed == 0
    first.add("loglikelihood", ("a", " b"), (-1.5, True))
    AnswerLog(tmp_path, 1).add("generate_until", ("a", {"until": ["."]}), "")  # of another process
    with (tmp_path / "0.jsonl").open("a") as file:
        file.write('["cut short')
    again = AnswerLog(tmp_path, 0)
    again.add("loglikelihood_rolling", ("a",), -3.25)
    again = AnswerLog(tmp_path, 0)
    assert again.resumed == 3
    asked: list[Any] = []

    def ask(requests: list[Any]) -> list[Any]:
        asked.extend(each.args for each in requests)
        return [("new", each.args) for each in requests]

    requests = [request("x", " b"), request("a", " b"), request("y", " b")]
    answers = again.answer("loglikelihood", requests, ask)
    assert answers == [("new", ("x", " b")), (-1.5, True), ("new", ("y", " b"))]
    assert again.answer("generate_until", [request("a", {"until": ["."]})], ask) == [""]
    assert again.answer("loglikelihood_rolling", [request("a")], ask) == [-3.25]
    assert asked == [("x", " b"), ("y", " b")]


def test_random_text_is_asked_again(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, 0)
    log.add("generate_until", ("a", {"do_sample": True}), "text")
    assert log.answer("generate_until", [request("a", {"do_sample": True})], lambda _: ["other"]) == ["other"]


def test_a_folder_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    AnswerLog(tmp_path / "file" / "x", 0).add("loglikelihood", ("a", "b"), (0.0, False))
