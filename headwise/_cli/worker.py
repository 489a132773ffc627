"""Train in one of the processes that `headwise uptrain --launch` starts.

    python -m headwise._cli.worker '{"model": MODEL, "out": OUT, ...}'

The argument holds the keyword arguments of `uptrain_model`. The launching process shows the result, so this one
writes nothing to stdout. To start processes by hand, start `python -m headwise uptrain` in each of them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers.utils import logging as transformers_logging

from headwise._cli import console
from headwise.errors import HeadwiseError
from headwise.recipes.uptrain import uptrain_model
from headwise.train.launch import INTERRUPTED


def run_worker(arguments: str) -> int:
    """Train as the arguments say.

    Args:
        arguments: a JSON object, the keyword arguments of `uptrain_model`.

    Returns:
        The exit code.
    """
    console.configure()
    logging: Any = transformers_logging
    logging.disable_progress_bar()
    try:
        with console.progress() as progress:
            uptrain_model(**json.loads(arguments), progress=progress)
    except HeadwiseError as error:
        console.error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:  # the first process names what is kept
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(run_worker(sys.argv[1]))
