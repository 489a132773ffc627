"""`headwise uptrain`: heal a converted folder by training it, here or in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.progress import SILENT, Progress
from headwise.recipes import settings as schema
from headwise.recipes.run import Run, Uptrained
from headwise.recipes.settings import Recipe
from headwise.records.manifest import read_record
from headwise.train.student import ModelFolder


def uptrain_model(
    model: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Recipe = "distill",
    teacher: str | Path | None = None,
    tokens: int | None = None,
    fraction: float | None = None,
    text: str | Sequence[str] = (),
    heldout: str | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    launch: str | None = None,
    processes: int | None = None,
    command: str = "",
    progress: Progress = SILENT,
) -> Uptrained | None:
    """Train a converted model and write the healed one to another folder.

    Args:
        model: the folder (or `org/name[@revision]`) to heal; it stays as it is.
        out: the folder to make; None: MODEL-uptrained.
        recipe: a name in the library, a YAML file, or a recipe.
        teacher: the parent; None: the source that the folder's headwise.json names, where it is found.
        tokens, fraction: the budget, in place of the recipe's.
        text: sources to train on, each as often as the others, and heldout: one to measure progress on, in place of
            the recipe's (`Data`).
        settings: `a.b=c`, laid over the recipe.
        resume: go on with an interrupted run. force: replace OUT, or begin again.
        launch, processes: start that many processes of this machine: see `launch.KINDS`.
        command: what the user typed, for the record.

    Returns:
        What came of it; None on all processes but the first.

    Raises:
        HeadwiseError: model, teacher, recipe and text do not fit each other, or the disk is too small.
        Diverged: the loss was lost; checkpoints stay.
        Interrupted: by a signal; the same call with `resume` goes on.
    """
    name = "its own" if isinstance(recipe, Recipe) else Path(recipe).stem
    if (tokens is not None or fraction is not None) and schema.load(recipe, settings).train is None:
        raise HeadwiseError("This recipe has no budget: it trains layer by layer.", "Set layerwise.tokens.")
    texts = [text] if isinstance(text, str) else text
    settings = [*settings, *_as_settings(tokens, fraction, texts, heldout)]
    chosen = schema.load(recipe, settings)
    target = Path(out) if out is not None else _beside(model)
    if launch is not None:
        if isinstance(recipe, Recipe):
            raise HeadwiseError("Other processes read a recipe from its file; this has none.", "Name a file.")
        options = {"--teacher": teacher, "--max-shard-size": max_shard_size, "--command": command}
        words = [str(recipe), str(target), "--model", str(model), *(["--resume"] * resume), *(["--force"] * force)]
        words += [word for option, value in options.items() if value for word in (option, str(value))]
        words += [word for setting in settings for word in ("--set", setting)]
        return _launched(launch, processes, words, target, name)
    source = open_checkpoint(model, progress=progress)
    run = Run(chosen, name, ModelFolder.of(source), teacher, target, command, progress)
    return run(resume=resume, force=force, max_shard_size=max_shard_size)


def _as_settings(
    tokens: int | None, fraction: float | None, texts: Sequence[str], heldout: str | None
) -> Iterator[str]:
    """What has an argument of its own, in the words of a recipe."""
    if tokens is not None or fraction is not None:
        yield f"train.tokens={json.dumps(tokens)}"
        yield f"train.fraction={json.dumps(fraction)}"
    if texts:
        # YAML does not know JSON's pairs of escapes for what lies beyond 16 bits.
        yield f"data.text={json.dumps(dict.fromkeys(texts, 1), ensure_ascii=False)}"
    if heldout is not None:
        yield f"data.heldout={json.dumps(heldout, ensure_ascii=False)}"


def _beside(model: str | Path) -> Path:
    """MODEL-uptrained: beside a folder, or in the working directory for a repository."""
    folder = Path(model).resolve()
    if folder.is_dir():
        return folder.with_name(f"{folder.name}-uptrained")
    return Path(str(model).partition("@")[0].rpartition("/")[2] + "-uptrained")


def _launched(kind: str, processes: int | None, words: Sequence[str], out: Path, name: str) -> Uptrained:
    """Run in other processes, and read what they wrote."""
    from headwise.train.launch import launch

    code = launch(kind, processes, words)
    if code:
        raise Stopped("The training processes ended early.", "What they said is above.", code)
    facts = (read_record(out) or {})["uptraining"][-1]
    nats, layers = facts["nats"], {int(layer): report for layer, report in facts["layerwise"].items()}
    return Uptrained(
        out, name, nats["before"], nats["after"], nats["parent"], facts["tokens"], facts["seconds"], layers
    )


class Stopped(HeadwiseError):
    """A run in other processes came to nothing; they have said why."""

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code if exit_code > 0 else 2
