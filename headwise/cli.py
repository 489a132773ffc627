"""The `headwise` command: parse, call, print. Nothing else."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from headwise import __version__
from headwise._cli import console as ui
from headwise._cli import render as show
from headwise._cli.app import Option, Parsed, Verbs, choice, flag, number, parsed
from headwise._cli.options import (
    CONVERT,
    DEVICE,
    EVAL,
    MODEL,
    OUT,
    SEED,
    SOURCE,
    UPTRAIN,
    benchmark,
)
from headwise.convert.settings import ConvertSettings
from headwise.errors import GateFailed
from headwise.fields import settings_of
from headwise.format import parse_bytes


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Change how a trained language model attends, and prove what changed.

    MODEL is a folder or a Hub repository: org/name or org/name@revision.
    """


@cli.command(
    params=[
        MODEL,
        number("--context", "Does the RoPE base hold at this length?"),
        Option("--plot", "Draw the bound that --context computes.", type=Path, metavar="PNG"),
        *SOURCE,
    ]
)
def inspect(**options: Any) -> None:
    """Show how a model attends, what it caches, and what it can become.

    Reads the configuration and the file headers only.
    """
    from headwise.convert.inspect import inspect_model

    plot = options.pop("plot", None)
    if plot and "context" not in options:
        raise click.UsageError("--plot draws what --context N computes: give both.")
    found = inspect_model(**options)
    show.render_inspection(found)
    if plot:
        from headwise.eval.report.plots import draw_reach

        draw_reach(**options, path=plot)
        ui.note(f"Drew {plot}.")
    ui.result(found)


@cli.command(params=[MODEL, OUT, *CONVERT])
def convert(**options: Any) -> None:
    """Convert MODEL into a folder OUT that stock transformers loads.

    \b
    headwise convert MODEL OUT --to gqa --groups 8
    headwise convert MODEL OUT --to mla --cache 12.5%
    headwise convert MODEL OUT --context 131072 --rope ntk
    """
    ConvertSettings(**{k: v for k, v in options.items() if k in settings_of(ConvertSettings)})  # before torch
    # torch's threads spin while they wait for one another. Where other programs want the cores that is lost twice:
    # measured on two busy cores, a conversion finished in 44 CPU seconds that was not done after 58. Counts only
    # before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from headwise.convert.pipeline import convert_model

    with ui.progress() as progress:
        outcome: Any = convert_model(**options, progress=progress)
    (show.render_plan if "dry_run" in options else show.render_outcome)(outcome)
    ui.result(outcome)


@cli.command(
    params=[
        OUT,
        Option("--against", "The parent, to compare with.", metavar="MODEL"),
        flag("--hashes", "Only compare tensors and files with the hashes in headwise.json."),
        *SOURCE,
    ]
)
def verify(**options: Any) -> None:
    """Reload OUT with the stock classes and check its promises."""
    if "against" not in options and options.keys() & {"revision", "token"}:
        raise click.UsageError("--revision and --token are the parent's: they need --against MODEL.")
    if options.keys() >= {"hashes", "against"}:
        raise click.UsageError("--hashes compares with headwise.json alone: leave out --against.")
    from headwise.convert.verify.check import verify_model

    with ui.progress() as progress:
        verification = verify_model(**options, progress=progress)
    show.render_verification(verification)
    ui.result(verification)
    if not verification.passed:
        raise GateFailed(f"{options['out']} failed its checks.")


@cli.command(params=UPTRAIN)
def uptrain(**options: Any) -> None:
    """Heal a converted MODEL by training it; write the result to OUT [MODEL-uptrained].

    \b
    headwise uptrain MODEL OUT --teacher PARENT --tokens 21M --text 'corpus/*.jsonl'
    headwise uptrain MODEL OUT --recipe two-stage --set train.learning_rate=1e-4
    headwise uptrain MODEL OUT --launch fsdp2 --processes 8
    """
    if "processes" in options and "launch" not in options:
        raise click.UsageError("--processes needs --launch.")
    if "tokens" in options and "fraction" in options:
        raise click.UsageError("--tokens and --fraction contradict each other: give one of them.")
    from headwise.recipes.uptrain import uptrain_model

    with ui.progress() as progress:
        healed = uptrain_model(**options, command=shlex.join(["headwise", *sys.argv[1:]]), progress=progress)
    if healed is not None:
        show.render_uptrained(healed)
        ui.result(healed)


@cli.command("eval", params=[click.Argument(["out"]), *EVAL])
def evaluate(**options: Any) -> None:
    """Measure what OUT lost against its parent, and whether that is more than noise.

    \b
    headwise eval OUT --baseline MODEL
    headwise eval OUT --baseline MODEL --tasks hellaswag,arc_easy --fail-above 1%
    accelerate launch --num_processes 8 -m headwise eval OUT --baseline MODEL --recipe standard
    """
    if options.keys() & {"fail_above", "cache"} and "baseline" not in options:
        raise click.UsageError("--fail-above and --no-cache are about the parent: give --baseline MODEL.")
    from headwise.eval.evaluate import evaluate_model

    with ui.progress() as progress:
        found = evaluate_model(options.pop("out"), options.pop("baseline", None), **options, progress=progress)
    if found is None:  # one of several processes, and not the one with the results
        return
    show.render_evaluation(found)
    ui.result(found)
    if "fail_above" in options and not found.passed:
        failed = [gate.name for gate in found.gates if not gate.passed]
        raise GateFailed(f"{len(failed)} of {len(found.gates)} gates failed: {', '.join(failed)}.")


@cli.command(
    params=[
        OUT,
        Option("--baseline", "The parent, measured in the same run.", metavar="MODEL"),
        number("--context", "Tokens in the cache [1024]."),
        number("--batch", "Sequences at once [1]."),
        parsed(
            "--memory", parse_bytes, "a size such as 24GiB", "Also compare at the largest batch that fits.", "SIZE"
        ),
        number("--steps", "Decode steps to time [16]."),
        choice("--dtype", ("bfloat16", "float16", "float32"), "Precision to measure in [bfloat16]."),
        DEVICE,
        *SOURCE,
    ]
)
def bench(**options: Any) -> None:
    """Time decoding of OUT and of its parent, with the fused kernels where they serve."""
    if "baseline" not in options:
        raise click.UsageError("bench compares with a parent: give --baseline MODEL.")
    import torch

    from headwise.eval.bench import bench_model

    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    with ui.progress() as progress:
        measured = bench_model(options.pop("out"), options.pop("baseline"), **options, progress=progress)
    show.render_bench(measured)
    ui.result(measured)


@cli.command(
    params=[
        OUT,
        click.Argument(["report"], type=Path),
        Option(
            "--eval-result eval_results",
            "Also tell a benchmark on the Hub; may be repeated.",
            type=Parsed("RESULT", benchmark, "TASK=DATASET:TASK_ID"),
            multiple=True,
            metavar="TASK=DATASET:ID",
        ),
    ]
)
def card(**options: Any) -> None:
    """Put the REPORT of an evaluation into OUT's model card.

    \b
    headwise card OUT OUT-eval
    headwise card OUT OUT-eval --eval-result gpqa_diamond=Idavidrein/gpqa:gpqa_diamond
    """
    from headwise.eval.report.card_section import update_card

    updated = update_card(options.pop("out"), options.pop("report"), **options)
    ui.say(f"Wrote {updated.figures} figure{'s' * (updated.figures != 1)} into {updated.card}.")
    for path in updated.eval_results:
        ui.say(f"Wrote {path}.")
    ui.result(updated)


@cli.command(
    params=[
        click.Argument(["folder"], type=Path),
        click.Argument(["repo"]),
        Option("--revision", "The branch, made if it is not there [main].", metavar="BRANCH"),
        flag("--private", "Make a new repository private."),
        flag("--create-pr", "Open a pull request."),
        flag("--dry-run", "Look at both and change nothing."),
        flag("--unverified", "Push what was not verified or has changed since."),
        flag("--force", "Replace another model."),
        SOURCE[1],
    ]
)
def push(**options: Any) -> None:
    """Upload FOLDER to the Hub repository REPO (org/name), in one commit.

    Run it again after an interruption: what has arrived is not sent twice.
    """
    from headwise.records.push import push_model

    with ui.progress() as progress:
        pushed = push_model(**options, progress=progress)
    show.render_push(pushed)
    ui.result(pushed)


@cli.command(
    params=[
        Option("--out", "Where to put models, table and picture [headwise-demo].", type=Path, metavar="DIR"),
        flag("--quick", "Fewer targets and tokens."),
        Option("--model", "Another model than the embedded one.", metavar="MODEL"),
        SEED,
    ]
)
def demo(**options: Any) -> None:
    """Shrink the KV cache of a real model and measure the damage."""
    from headwise.demo.demo import demo

    with ui.progress() as progress:
        outcome = demo(**options, progress=progress)
    show.render_demo(outcome)
    ui.result(outcome)


@cli.command()
def env() -> None:
    """Show versions and devices, for a bug report."""
    from headwise.environment import environment

    facts = environment()
    ui.table((), facts.items())
    ui.result(facts)


@cli.group()
def recipes() -> None:
    """The recipes for training and for evaluation: list, show, validate."""


@recipes.command("list")
def list_recipes() -> None:
    """Name every recipe and what it is for."""
    from headwise.eval import settings as evaluation
    from headwise.recipes import settings as training

    found = {
        verb: {path.stem: kind.load(path).about.strip() for path in sorted(kind.LIBRARY.glob("*.yaml"))}
        for verb, kind in (("uptrain", training), ("eval", evaluation))
    }
    ui.table(
        ("recipe", "for", "about"), [(name, verb, about) for verb in found for name, about in found[verb].items()]
    )
    ui.result(found)


RECIPE = [click.Argument(["recipe"]), flag("--eval evaluation", "Of two by this name, the one of `headwise eval`.")]


@recipes.command("show", params=RECIPE)
def show_recipe(recipe: str, evaluation: bool = False) -> None:
    """Print a recipe as it stands in its file."""
    path, loaded = _recipe(recipe, evaluation)
    ui.say_block(path.read_text(encoding="utf-8"))
    ui.result(loaded)


@recipes.command("validate", params=RECIPE)
def validate_recipe(recipe: str, evaluation: bool = False) -> None:
    """Check a recipe: its keys, their types and values."""
    ui.result(_recipe(recipe, evaluation)[1])
    ui.say(f"{recipe} is valid.")


def _recipe(name: str, evaluation: bool) -> tuple[Path, Any]:
    """A recipe of either kind: a name is looked up among the training recipes first, a file says what it is."""
    from headwise.eval import settings as measuring
    from headwise.recipes import settings as training

    trained = not Path(name).is_file() and (training.LIBRARY / f"{name}.yaml").is_file()
    kind: Any = measuring if evaluation or (not trained and measuring.is_evaluation(name)) else training
    return kind.find(name), kind.load(name)


def main() -> None:
    """The console script."""
    cli(prog_name="headwise")
