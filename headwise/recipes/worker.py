"""A recipe from the command line, in one process or in each of several.

    python -m headwise.recipes.worker RECIPE OUT [--model MODEL] [--teacher MODEL] [--set a.b=c ...] [--resume]

`accelerate launch -m headwise.recipes.worker ...` and `torchrun -m headwise.recipes.worker ...` run the same on
several processes; `headwise uptrain --launch` does that for you.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import transformers

from headwise._cli import console as ui
from headwise.demo.pretrain import pretrain
from headwise.errors import HeadwiseError
from headwise.progress import SILENT, Progress
from headwise.recipes import settings as schema
from headwise.recipes.uptrain import uptrain_model

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe from the command line."""
    parser = argparse.ArgumentParser(description="Train as a recipe says.")
    parser.add_argument("recipe", help="a name in the library, or a YAML file")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--model", help="the model to train, where the recipe does not make one")
    parser.add_argument("--teacher", help="the model it learns from")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="settings")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file")
    parser.add_argument("--command", help="what to record as the command, in place of this one")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    ui.configure()
    transformers.utils.logging.disable_progress_bar()
    command = options.command or shlex.join(["python", "-m", "headwise.recipes.worker", *given])
    try:
        recipe = schema.load(options.recipe, options.settings)
        if (recipe.init is None) == (options.model is None):
            needs = "starts from nothing and takes no" if recipe.init else "needs a"
            raise HeadwiseError(f"This recipe {needs} model.", "--model FOLDER names the one to train.")
        with ui.progress() as shown:
            progress = shown if os.environ.get("RANK", "0") == "0" else SILENT
            said = _train(recipe, options, command, progress)
    except HeadwiseError as error:
        ui.error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:  # the first process says what is kept
        return INTERRUPTED
    if said:
        ui.say(said)
    return 0


def _train(recipe: schema.Recipe, options: argparse.Namespace, command: str, progress: Progress) -> str:
    """What there is to say about it; nothing in processes other than the first."""
    if recipe.init is not None:
        record = pretrain(recipe, options.out, command=command, progress=progress)
        tokens, nats = (record["tokens"], record["heldout"]["nats"]) if record else (0, 0.0)
    else:
        done = uptrain_model(
            options.model,
            options.out,
            recipe=options.recipe,
            settings=options.settings,
            teacher=options.teacher,
            resume=options.resume,
            force=options.force,
            max_shard_size=options.max_shard_size,
            command=command,
            progress=progress,
        )
        tokens, nats = (done.tokens, done.after) if done else (0, 0.0)
    return f"{options.out}: {tokens:,} tokens, {nats:.4f} nats per token on the held-out text" if nats else ""


if __name__ == "__main__":
    sys.exit(main())
