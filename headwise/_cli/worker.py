"""Train in one of the processes that `headwise uptrain --launch` starts.

    python -m headwise._cli.worker RECIPE OUT --model MODEL [--teacher MODEL] [--set a.b=c ...] [--resume]

The launching process shows the result, so this one writes nothing to stdout.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from headwise._cli import console
from headwise.errors import HeadwiseError
from headwise.recipes.settings import SHARD_SIZE
from headwise.recipes.uptrain import uptrain_model
from headwise.train.launch import INTERRUPTED, PROCESS_MODULE


def run_worker(arguments: Sequence[str] | None = None) -> int:
    """Train as the arguments say.

    Args:
        arguments: in place of those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description="Train in one process of a distributed run.")
    parser.add_argument("recipe", help="a name in the library, or a YAML file")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--model", required=True, help="the model to train")
    parser.add_argument("--teacher", help="the parent")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="settings")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument("--max-shard-size", default=SHARD_SIZE, help="largest weight file")
    parser.add_argument("--command", help="for the record, in place of this command line")
    words = sys.argv[1:] if arguments is None else arguments
    options = vars(parser.parse_args(words))
    options["command"] = options["command"] or shlex.join(["python", "-m", PROCESS_MODULE, *words])
    console.configure()
    logging: Any = transformers_logging
    logging.disable_progress_bar()
    try:
        with console.progress() as progress:
            uptrain_model(options.pop("model"), options.pop("out"), **options, progress=progress)
    except HeadwiseError as error:
        console.error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:  # the first process names what is kept
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(run_worker())
