"""Questions of published benchmarks, from a local file or from the Hub, in one form.

The prompts follow lm-eval's tasks of the same names. A local file is FOLDER/NAME.jsonl or .json, with rows as
the data set has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.io.fs import os_errors

Row = dict[str, Any]


def _clean(text: str) -> str:
    """Return a text of HellaSwag without the marks of its source."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag_question(row: Row) -> Row:
    """Return the question of a row: its context and four endings.

    Args:
        row: of Rowan/hellaswag.
    """
    if "query" in row:  # already in lm-eval's form
        return {"prompt": row["query"], "choices": row["choices"], "answer": int(row["gold"])}
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "prompt": _clean(context),
        "choices": [_clean(ending) for ending in row["endings"]],
        "answer": int(row["label"]),
    }


def piqa_question(row: Row) -> Row:
    """Return the question of a row: a goal and two solutions.

    Args:
        row: of baber/piqa.
    """
    choices = [row["sol1"], row["sol2"]]
    return {"prompt": f"Question: {row['goal']}\nAnswer:", "choices": choices, "answer": int(row["label"])}


def arc_question(row: Row) -> Row:
    """Return the question of a row, from the data set's form on the Hub or from that of its authors' files.

    Args:
        row: of allenai/ai2_arc.
    """
    question = row["question"]
    if isinstance(question, dict):
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    else:
        choices = row["choices"]
    answer = choices["label"].index(row["answerKey"])
    return {"prompt": f"Question: {question}\nAnswer:", "choices": choices["text"], "answer": answer}


def winogrande_question(row: Row) -> Row:
    """Return the question of a row: two beginnings of one sentence, and its end.

    Args:
        row: of allenai/winogrande.
    """
    begin, _, end = row["sentence"].partition("_")
    choices = [begin + row["option1"], begin + row["option2"]]
    return {"choices": choices, "continuation": end.strip(), "answer": int(row["answer"]) - 1}


def lambada_question(row: Row) -> Row:
    """Return the question of a row: a passage and its last word.

    Args:
        row: of EleutherAI/lambada_openai.
    """
    prompt, _, word = row["text"].rpartition(" ")
    return {"prompt": prompt, "answer": word}


# Name of a file -> repository, configuration and split on the Hub, and the form of a question.
SOURCES: dict[str, tuple[str, str | None, str, Callable[[Row], Row]]] = {
    "hellaswag": ("Rowan/hellaswag", None, "validation", hellaswag_question),
    "piqa": ("baber/piqa", None, "validation", piqa_question),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc_question),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc_question),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande_question),
    "lambada": ("EleutherAI/lambada_openai", "default", "test", lambada_question),
}
# Tasks of lm-eval whose names are not those of their files.
LM_EVAL_NAMES = {"lambada_openai": "lambada"}


def question_file(name: str, folder: Path) -> Path | None:
    """Return the file of a benchmark's questions in a folder; None if there is none.

    Args:
        name: a key of `SOURCES`.
        folder: may hold NAME.jsonl or NAME.json.
    """
    paths = (folder.expanduser() / f"{name}.{kind}" for kind in ("jsonl", "json"))
    return next((path for path in paths if path.is_file()), None)


def local_task(task: str, folder: Path) -> str:
    """Return the task of this package that reads the questions of a task of lm-eval from a folder.

    Args:
        task: name of a task of lm-eval.
        folder: holds files such as hellaswag.jsonl.

    Returns:
        A name such as headwise_hellaswag; `task` itself if the folder does not have its questions.
    """
    name = LM_EVAL_NAMES.get(task, task)
    return f"headwise_{name}" if name in SOURCES and question_file(name, folder) else task


def read_questions(name: str, folder: str | Path | None = None) -> list[Row]:
    """Return the questions of a benchmark.

    Args:
        name: a key of `SOURCES`.
        folder: holds NAME.jsonl or NAME.json; None: the Hub.

    Raises:
        HeadwiseError: there is no such file, or a row has another form.
    """
    repository, configuration, split, make_question = SOURCES[name]
    if folder is None:
        from datasets import load_dataset

        rows = list(load_dataset(repository, configuration, split=split))
        where = repository
    else:
        path = question_file(name, Path(folder))
        if path is None:
            raise HeadwiseError(
                f"There is no {Path(folder) / name}.jsonl, which the task headwise_{name} reads.",
                f"Write the rows of {repository} there, one JSON object in each line, or leave out `task_data`.",
            )
        where = str(path)
        try:
            with os_errors(path, "read"):
                text = path.read_text(encoding="utf-8")
            lines = [line for line in text.split("\n") if line.strip()]
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
        except ValueError as error:
            raise HeadwiseError(f"{where} is not JSON: {error}.", "Write one JSON object in each line.") from None
    try:
        return [make_question(row) for row in rows]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise HeadwiseError(
            f"{where} has a row that is no question of {name}: {type(error).__name__} {error}.",
            f"Its rows need the fields of {repository}.",
        ) from None


def _dataset(name: str, task_data: str | None = None, **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(read_questions(name, task_data))}


hellaswag_dataset = partial(_dataset, "hellaswag")
piqa_dataset = partial(_dataset, "piqa")
arc_easy_dataset = partial(_dataset, "arc_easy")
arc_challenge_dataset = partial(_dataset, "arc_challenge")
winogrande_dataset = partial(_dataset, "winogrande")
lambada_dataset = partial(_dataset, "lambada")
