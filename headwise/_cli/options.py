"""Declare the options of every verb. The settings classes of the library hold the rules and the defaults."""

from __future__ import annotations

from pathlib import Path

import click

from headwise._cli.app import Option, options_of
from headwise.convert.settings import ConvertSettings
from headwise.eval.settings import EvalSettings
from headwise.recipes.settings import UptrainSettings


def parse_benchmark(word: str) -> tuple[str, str, str]:
    """Return ("task", "org/dataset", "id") for "task=org/dataset:id".

    Args:
        word: of the command line.

    Raises:
        ValueError: the word does not have this form.
    """
    task, equals, rest = word.partition("=")
    dataset, colon, task_id = rest.partition(":")
    if not (task and equals and colon and task_id and dataset.count("/") == 1):
        raise ValueError
    return task, dataset, task_id


MODEL = click.Argument(["model"])
OUT = click.Argument(["out"], type=Path)
BASELINE = Option("--baseline", "The parent, measured in the same run.", metavar="MODEL")
TOKEN = Option("--token", "Hub token; HF_TOKEN and `hf auth login` work too.", metavar="TOKEN")
SOURCE = [Option("--revision", "Branch, tag or commit of a Hub repository.", metavar="REV"), TOKEN]

CONVERT = [MODEL, OUT, *options_of(ConvertSettings), *SOURCE]
UPTRAIN = [MODEL, click.Argument(["out"], type=Path, required=False), *options_of(UptrainSettings), TOKEN]
EVAL = [click.Argument(["out"]), *options_of(EvalSettings), TOKEN]
