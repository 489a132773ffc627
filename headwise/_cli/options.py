"""Declare the options of every verb. The settings classes of the library hold the rules and the defaults."""

from __future__ import annotations

from pathlib import Path

import click

from headwise._cli.app import Option, choice, flag, number, options_of, parsed, section
from headwise.convert.settings import ConvertSettings


def share(value: str) -> float:
    """ "12.5%" or "0.125" -> 0.125."""
    fraction = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    if not 0 < fraction <= 1:
        raise ValueError
    return fraction


def damage(value: str) -> float:
    """ "1%" -> 0.01; 0 is one too."""
    return 0.0 if float(value.removesuffix("%")) == 0 else share(value)


def limit(value: str) -> float:
    """ "100" or "0.1" -> lm-eval's limit."""
    number_ = float(value)
    if not (0 < number_ < 1 or (number_ >= 1 and number_ == int(number_))):
        raise ValueError
    return number_ if number_ < 1 else int(number_)


def batch(value: str) -> int | str:
    """ "auto", "auto:4" or a number."""
    if value.partition(":")[0] == "auto":
        return value
    if int(value) < 1:
        raise ValueError
    return int(value)


def names(value: str) -> list[str]:
    """ "a,b" -> ["a", "b"]."""
    found = [name.strip() for name in value.split(",") if name.strip()]
    if not found:
        raise ValueError
    return found


def benchmark(value: str) -> tuple[str, str, str]:
    """ "task=org/dataset:id" -> ("task", "org/dataset", "id")."""
    task, equals, rest = value.partition("=")
    dataset, colon, task_id = rest.partition(":")
    if not (task and equals and colon and task_id and dataset.count("/") == 1):
        raise ValueError
    return task, dataset, task_id


def count(value: str) -> int:
    """ "21M" -> 21,000,000."""
    scale = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(value[-1:], 1)
    number_ = round(float(value if scale == 1 else value[:-1]) * scale)
    if number_ < 1:
        raise ValueError
    return number_


MODEL = click.Argument(["model"])
OUT = click.Argument(["out"], type=Path)
SOURCE = [
    Option("--revision", "Branch, tag or commit of a Hub repository.", metavar="REV"),
    Option("--token", "Hub token; HF_TOKEN and `hf auth login` work too.", metavar="TOKEN"),
]
DEVICE = Option("--device", "cpu, cuda or cuda:N [a GPU if there is one].", metavar="DEVICE")
SEED = number("--seed", "Of everything random [0].", minimum=0)

CONVERT = [*options_of(ConvertSettings), *SOURCE]

UPTRAIN = [
    click.Argument(["model"]),
    click.Argument(["out"], type=Path, required=False),
    *section(
        "Training",
        Option("--recipe", "A name of `headwise recipes list`, or a YAML file [distill].", metavar="RECIPE"),
        Option("--teacher", "The parent [the source that MODEL records].", metavar="MODEL"),
        parsed("--tokens", count, "a number of tokens such as 21M", "Budget in tokens [the recipe's].", "N"),
        parsed("--fraction", share, "a share such as 5%", "Budget as a share of the pretraining.", "SHARE"),
        Option(
            "--text",
            "What to train on: a FILE (txt, jsonl, parquet), hf:DATASET or builtin; repeatable [the recipe's].",
            multiple=True,
            metavar="SOURCE",
        ),
        Option("--heldout", "What to measure progress on, likewise [the recipe's].", metavar="SOURCE"),
        Option("--set settings", "Change a field of the recipe; may be repeated.", multiple=True, metavar="a.b=c"),
    ),
    *section(
        "Several processes",
        choice("--launch", ("single", "ddp", "fsdp2"), "Start them through accelerate: single, ddp or fsdp2."),
        number("--processes", "How many [one for each GPU]."),
    ),
    Option("--max-shard-size", "Largest weight file [5GB].", metavar="SIZE"),
    flag("--force", "Replace OUT once the new folder is complete."),
    flag("--resume", "Go on with an interrupted run."),
]


EVAL = [
    Option("--baseline", "The parent, measured in the same run.", metavar="MODEL"),
    *section(
        "What to measure",
        Option("--recipe", "quick, standard, long-context or a FILE [quick].", metavar="RECIPE"),
        parsed("--tasks", names, "a list such as hellaswag,arc_easy", "Tasks of lm-eval.", "NAMES"),
        flag("--online", "Also the recipe's tasks that download their questions (RULER)."),
        Option("--include-path", "A folder with tasks of yours; may be repeated.", multiple=True, metavar="DIR"),
        number("--num-fewshot", "Examples in each prompt [each task's own].", minimum=0),
        parsed("--limit", limit, "a number or a share below 1", "Questions of each task [all].", "N"),
        parsed(
            "--fail-above", damage, "a share such as 1%", "Exit 1 if a loss is above this beyond doubt.", "SHARE"
        ),
    ),
    *section(
        "How to run it",
        parsed("--batch-size", batch, "a number or auto", "lm-eval's [16 on a CPU, auto on a GPU].", "N"),
        choice("--backend", ("hf", "vllm"), "What runs the tasks [hf]."),
        choice("--dtype", ("auto", "bfloat16", "float16", "float32"), "Precision [on a CPU float32, else auto]."),
        Option("--no-cache cache", "Measure the parent again.", is_flag=True, flag_value=False),
    ),
    *section(
        "Output",
        Option("--report", "The report's folder [NAME-eval].", type=Path, metavar="DIR"),
        flag("--force", "Replace that folder."),
    ),
    SEED,
    DEVICE,
    SOURCE[1],
]
