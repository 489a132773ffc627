"""Uptrain a converted model: `headwise uptrain`, in this process or in processes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise.environment import find_device
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import open_checkpoint
from headwise.progress import SILENT, Progress
from headwise.recipes.run import Run, UptrainResult
from headwise.recipes.settings import SHARD_SIZE, UptrainRecipe, UptrainSettings
from headwise.records.manifest import read_record
from headwise.train.launch import launch_processes
from headwise.train.student import ModelFolder


def uptrain_model(
    model: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Path | UptrainRecipe = "distill",
    teacher: str | Path | None = None,
    tokens: int | None = None,
    fraction: float | None = None,
    text: str | Sequence[str] = (),
    heldout: str | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    max_shard_size: int | str = SHARD_SIZE,
    launch: str | None = None,
    processes: int | None = None,
    accept: str | Sequence[str] = (),
    seed: int | None = None,
    device: str | None = None,
    token: str | None = None,
    command: str = "",
    progress: Progress = SILENT,
) -> UptrainResult | None:
    """Train a converted model and write the result to another folder.

    Args:
        model: the folder (or `org/name[@revision]`) to train; it stays as it is.
        out: the folder to make; None: MODEL-uptrained.
        recipe: a name in the library, a YAML file, or a recipe.
        teacher: the parent; None: the source that the folder's headwise.json names, where it can be found.
        tokens: budget in tokens, in place of the recipe's.
        fraction: budget as a fraction of the pretraining, in place of the recipe's.
        text: sources to train on, each once per pass, in place of the recipe's (see `headwise.text.sources`).
        heldout: source that measures progress, in place of the recipe's.
        settings: `a.b=c`, laid over the recipe.
        resume: continue an interrupted run.
        force: replace OUT, or begin again.
        max_shard_size: of the largest weight file.
        launch: start processes of this machine through accelerate: "single", "ddp" or "fsdp2".
        processes: number of processes; None: one for each accelerator.
        accept: names of checks whose failure does not stop the run; the record keeps it.
        seed: of everything random; None: the recipe's.
        device: "cpu" or "cuda"; None: an accelerator if there is one.
        token: of the Hub, for the model and its parent.
        command: the command line, for the record.
        progress: gets stages and figures.

    Returns:
        The result; None on all processes but the first.

    Raises:
        SettingError: a value is not legal, has no effect, or contradicts another one.
        HeadwiseError: model, teacher, recipe and text do not match, or the disk is too small.
        GateFailed: the model failed a check that is not in `accept`. The trained weights stay in the work folder,
            and the same call with `resume` and `accept` publishes them.
        Diverged: the loss is NaN or diverges; checkpoints are kept.
        Interrupted: a signal stopped the run; the same call with `resume` continues it.
    """
    chosen = UptrainSettings(
        recipe=recipe,
        teacher=teacher,
        tokens=tokens,
        fraction=fraction,
        text=text,
        heldout=heldout,
        settings=settings,
        launch=launch,
        processes=processes,
        max_shard_size=max_shard_size,
        force=force,
        resume=resume,
        accept=accept,
        seed=seed,
        device=device,
    )
    target = Path(out) if out is not None else _default_out(model)
    if chosen.launch is not None:
        if token is not None:
            raise SettingError(
                "token",
                "`token` is not passed to other processes.",
                "Set HF_TOKEN, or log in with `hf auth login`.",
            )
        return _launch(chosen, model, target, command)
    if chosen.device is not None:
        find_device(chosen.device)
    folder = ModelFolder.of(open_checkpoint(model, token=token, progress=progress))
    run = Run(
        chosen.plan,
        chosen.name,
        folder,
        chosen.teacher,
        target,
        command,
        progress,
        chosen.accept,
        chosen.device,
        token,
    )
    return run(resume=chosen.resume, force=chosen.force, max_shard_size=chosen.max_shard_size)


def _default_out(model: str | Path) -> Path:
    """Return MODEL-uptrained: beside a folder, or in the working directory for a repository."""
    folder = Path(model).resolve()
    if folder.is_dir():
        return folder.with_name(f"{folder.name}-uptrained")
    return Path(str(model).partition("@")[0].rpartition("/")[2] + "-uptrained")


def _launch(settings: UptrainSettings, model: str | Path, out: Path, command: str) -> UptrainResult:
    """Run in other processes, and read what they wrote."""
    assert settings.launch is not None
    arguments = {
        "model": str(model),
        "out": str(out),
        "recipe": str(settings.recipe),
        "teacher": None if settings.teacher is None else str(settings.teacher),
        "settings": settings.assignments,
        "max_shard_size": settings.max_shard_size,
        "resume": settings.resume,
        "force": settings.force,
        "accept": settings.accept,
        "command": command,
    }
    code = launch_processes(settings.launch, settings.processes, arguments)
    if code:
        raise ProcessesFailed("The training processes ended early.", "Their messages are above.", code)
    facts = (read_record(out) or {})["uptraining"][-1]
    nats, layers = facts["nats"], {int(layer): report for layer, report in facts["layerwise"].items()}
    return UptrainResult(
        out,
        settings.name,
        nats["before"],
        nats["after"],
        nats["parent"],
        facts["tokens"],
        facts["seconds"],
        layers,
        facts["gap_closed"],
    )


class ProcessesFailed(HeadwiseError):
    """Training processes failed; their own messages give the reason.

    Args:
        message: what failed.
        hint: where to read more.
        exit_code: of the process that failed first.
    """

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code if exit_code > 0 else 2
