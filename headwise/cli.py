"""Define the verbs of the `headwise` command. Each one takes its options, makes one call and renders the result."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from headwise._cli import console, render
from headwise._cli.app import (
    Option,
    ParsedType,
    Verbs,
    check_options,
    flag_option,
    length_option,
    options_of,
)
from headwise._cli.options import (
    BASELINE,
    CONVERT,
    EVAL,
    MODEL,
    OUT,
    SOURCE,
    TOKEN,
    UPTRAIN,
    parse_benchmark,
)
from headwise.convert.calibration.sample_settings import SampleSettings
from headwise.convert.settings import ConvertSettings
from headwise.convert.verify.settings import VerifySettings
from headwise.demo.settings import DemoSettings
from headwise.environment import HEADWISE_VERSION
from headwise.errors import GateFailed, HeadwiseError
from headwise.eval.bench_settings import BenchSettings
from headwise.eval.settings import EvalSettings
from headwise.fields import settings_of
from headwise.format import public_command
from headwise.recipes.settings import UptrainSettings
from headwise.schema import nearest
from headwise.serving.settings import ServingSettings


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(HEADWISE_VERSION, message="%(prog)s %(version)s")
def cli() -> None:
    """Change how a trained language model attends, and verify the result.

    MODEL is a folder, a .gguf file or a Hub repository: org/name or org/name@revision.
    """


@cli.command(
    "inspect",
    params=[
        click.Argument(["model"], required=False),
        flag_option("--types", "List the supported model types by family; without MODEL."),
        length_option(
            "--context", "Check the RoPE base at this context length, such as 32K, and forecast sequences of it."
        ),
        Option("--plot", "Draw the bound that --context computes, as PNG and SVG.", type=Path, metavar="PNG"),
        *options_of(ServingSettings),
        *SOURCE,
    ],
)
def _inspect(**options: Any) -> None:
    """Show attention, KV cache and possible layouts of MODEL.

    Reads the configuration and the file headers only, and names the engines that serve each layout. An option of
    the section Serving adds a forecast: cache, weights and sequences on each GPU.

    \b
    headwise inspect MODEL
    headwise inspect MODEL --context 131072 --plot bound.png
    headwise inspect --types
    headwise inspect MODEL --engine vllm --tp 8 --card h100 --context 32768
    """
    if ("types" in options) == ("model" in options):
        raise click.UsageError("Give MODEL, or --types for a list of the supported model types.")
    if options.pop("types", None):
        if options:
            raise click.UsageError("--types lists the supported model types: leave out the other options.")
        _list_types()
        return
    check_options(ServingSettings, options)
    from headwise.convert.inspect import inspect_model

    plot = options.pop("plot", None)
    if plot and "context" not in options:
        raise click.UsageError("--plot draws the bound that --context computes: give both.")
    inspection = inspect_model(**options)
    render.render_inspection(inspection, reasons="engines" in options)
    if plot:
        from headwise.eval.report.plots import plot_model_bound

        kept = {name: value for name, value in options.items() if name not in settings_of(ServingSettings)}
        drawn = plot_model_bound(**kept, path=plot)
        console.note(f"Drew {drawn}, and the SVG beside it.")
    console.print_json(inspection)


def _list_types() -> None:
    """Print the supported model types by family."""
    from headwise.models.table import supported_types

    families = supported_types()
    console.print_table(("family", "model types"), [(name, ", ".join(types)) for name, types in families.items()])
    console.print_json(families)


@cli.command("convert", params=CONVERT)
def _convert(**options: Any) -> None:
    """Convert MODEL into a folder OUT that stock transformers loads.

    \b
    headwise convert MODEL OUT --to gqa --groups 8
    headwise convert MODEL OUT --to mla --cache 12.5%
    headwise convert MODEL OUT --context 131072 --rope ntk
    """
    check_options(ConvertSettings, options)
    # The threads of torch spin while they wait for each other, which costs more where other programs use the cores:
    # measured on two busy cores, a conversion of 44 CPU seconds was unfinished after 58. torch reads the variable
    # when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from headwise.convert.pipeline import convert_model

    with console.progress() as progress:
        result: Any = convert_model(**options, progress=progress)
    (render.render_plan if "dry_run" in options else render.render_conversion)(result)
    console.print_json(result)


@cli.command(
    "verify",
    params=[
        OUT,
        *options_of(VerifySettings),
        *SOURCE,
    ],
)
def _verify(**options: Any) -> None:
    """Reload OUT with the stock classes and check it.

    \b
    headwise verify OUT --against MODEL
    headwise verify OUT --hashes
    """
    if "against" not in options and options.keys() & {"revision", "token"}:
        raise click.UsageError("--revision and --token are for the parent: they need --against MODEL.")
    check_options(VerifySettings, options)
    from headwise.convert.verify.check import verify_model

    with console.progress() as progress:
        verification = verify_model(**options, progress=progress)
    render.render_verification(verification)
    console.print_json(verification)
    if not verification.passed:
        accepted = verification.accepted and not verification.refused
        more = " The failure was accepted when the folder was written." if accepted else ""
        raise GateFailed(f"{options['out']} failed its checks.{more}")


@cli.command(
    "sample",
    params=[
        MODEL,
        *options_of(SampleSettings),
        *SOURCE,
    ],
)
def _sample(**options: Any) -> None:
    """Write text that MODEL samples from itself, as calibration and training text.

    \b
    headwise sample MODEL --tokens 1M --out text.jsonl
    headwise convert MODEL OUT --to mqa --calibrate text.jsonl
    headwise uptrain OUT --teacher MODEL --tokens 20M --text text.jsonl
    """
    check_options(SampleSettings, options)
    from headwise.convert.sample import sample_text

    with console.progress() as progress:
        result = sample_text(options.pop("model"), options.pop("out", None), **options, progress=progress)
    console.print_line(f"Wrote {result.tokens:,} tokens in {result.documents:,} documents to {result.out}.")
    console.print_json(result)


@cli.command("uptrain", params=UPTRAIN)
def _uptrain(**options: Any) -> None:
    """Train a converted MODEL to recover its quality.

    The result is a new folder, OUT [MODEL-uptrained].

    \b
    headwise uptrain MODEL OUT --teacher PARENT --tokens 21M --text 'corpus/*.jsonl'
    headwise uptrain MODEL OUT --recipe two-stage --tokens 21M --set train.learning_rate=1e-4
    headwise uptrain MODEL OUT --tokens 21M --launch fsdp2 --processes 8
    """
    check_options(UptrainSettings, options)
    from headwise.recipes.uptrain import uptrain_model

    with console.progress() as progress:
        result = uptrain_model(**options, command=public_command(["headwise", *sys.argv[1:]]), progress=progress)
    if result is not None:  # in the first of several processes
        render.render_uptraining(result)
        console.print_json(result)


@cli.command("eval", params=EVAL)
def _eval(**options: Any) -> None:
    """Measure the loss of quality of OUT against its parent.

    Every difference has a confidence interval.

    \b
    headwise eval OUT --baseline MODEL
    headwise eval OUT --baseline MODEL --tasks hellaswag,arc_easy --fail-above 1%
    accelerate launch --num_processes 8 -m headwise eval OUT --baseline MODEL --recipe standard
    """
    check_options(EvalSettings, options)
    from headwise.eval.evaluate import evaluate_model

    with console.progress() as progress:
        evaluation = evaluate_model(options.pop("out"), options.pop("baseline", None), **options, progress=progress)
    if evaluation is None:  # in the processes without the whole result
        return
    render.render_evaluation(evaluation)
    console.print_json(evaluation)
    if "fail_above" in options and not evaluation.passed:
        failed = [gate.name for gate in evaluation.gates if not gate.passed]
        raise GateFailed(f"{len(failed)} of {len(evaluation.gates)} gates failed: {', '.join(failed)}.")


@cli.command(
    "bench",
    params=[
        OUT,
        BASELINE,
        *options_of(BenchSettings),
        *SOURCE,
    ],
)
def _bench(**options: Any) -> None:
    """Time decoding of OUT and of its parent.

    The fused kernels are used where they can run.

    \b
    headwise bench OUT --baseline MODEL --context 8192 --batch 8
    headwise bench OUT --baseline MODEL --memory 24GB
    """
    if "baseline" not in options:
        raise click.UsageError("bench compares with a parent: give --baseline MODEL.")
    check_options(BenchSettings, options)
    from headwise.eval.bench import bench_model

    with console.progress() as progress:
        result = bench_model(options.pop("out"), options.pop("baseline"), **options, progress=progress)
    render.render_bench(result)
    console.print_json(result)


@cli.command(
    "card",
    params=[
        OUT,
        click.Argument(["report"], type=Path),
        Option(
            "--eval-result eval_results",
            "Also write the result of a benchmark on the Hub; may be repeated.",
            type=ParsedType("RESULT", parse_benchmark, "TASK=DATASET:TASK_ID"),
            multiple=True,
            metavar="TASK=DATASET:ID",
        ),
    ],
)
def _card(**options: Any) -> None:
    """Add the figures of an evaluation to the model card of OUT.

    REPORT is the folder that `headwise eval` wrote.

    \b
    headwise card OUT OUT-eval
    headwise card OUT OUT-eval --eval-result gpqa_diamond=Idavidrein/gpqa:gpqa_diamond
    """
    from headwise.eval.report.card_section import update_card

    update = update_card(options.pop("out"), options.pop("report"), **options)
    console.print_line(f"Wrote {update.figures} figure{'s' * (update.figures != 1)} into {update.card}.")
    for path in update.eval_results:
        console.print_line(f"Wrote {path}.")
    console.print_json(update)


@cli.command(
    "push",
    params=[
        click.Argument(["folder"], type=Path),
        click.Argument(["repo"]),
        Option("--revision", "The branch; made if it does not exist [main].", metavar="BRANCH"),
        flag_option("--private", "Make a new repository private."),
        flag_option("--create-pr", "Open a pull request."),
        flag_option("--dry-run", "Check the folder, and the repository if the Hub can be reached; change nothing."),
        flag_option("--unverified", "Push a folder that is not verified, or has changed since."),
        flag_option("--force", "Replace another model."),
        TOKEN,
    ],
)
def _push(**options: Any) -> None:
    """Upload FOLDER to the Hub repository REPO (org/name).

    One commit publishes all files. After an interruption run it again: files that have arrived are not sent twice.

    \b
    headwise push OUT org/name --dry-run
    headwise push OUT org/name --private
    """
    from headwise.records.push import push_model

    with console.progress() as progress:
        push = push_model(**options, progress=progress)
    render.render_push(push)
    console.print_json(push)


@cli.command(
    "demo",
    params=[
        *options_of(DemoSettings),
        TOKEN,
    ],
)
def _demo(**options: Any) -> None:
    """Convert the embedded model and measure the loss of quality.

    \b
    headwise demo --quick
    """
    check_options(DemoSettings, options)
    from headwise.demo.demo import demo

    with console.progress() as progress:
        result = demo(**options, progress=progress)
    render.render_demo(result)
    console.print_json(result)


@cli.command("env")
def _env() -> None:
    """Show versions and devices, for a bug report.

    \b
    headwise env --json
    """
    from headwise.environment import environment

    facts = environment()
    console.print_table((), facts.items())
    console.print_json(facts)


@cli.group("recipes")
def _recipes() -> None:
    """List, show and validate training and evaluation recipes."""


@_recipes.command("list")
def _list_recipes() -> None:
    """List every recipe with its purpose.

    \b
    headwise recipes list
    """
    from headwise.eval.settings import load_eval_recipe
    from headwise.recipes.settings import load_uptrain_recipe

    loaders: dict[str, Any] = {"uptrain": load_uptrain_recipe, "eval": load_eval_recipe}
    recipes = {
        verb: {name: loaders[verb](name).about.strip() for name in names} for verb, names in _recipe_names().items()
    }
    console.print_table(
        ("recipe", "verb", "purpose"),
        [(name, verb, about) for verb in recipes for name, about in recipes[verb].items()],
    )
    console.print_json(recipes)


def _complete_recipe(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of recipes that begin with a word, for shell completion."""
    names = {name for known in _recipe_names().values() for name in known}
    return sorted(name for name in names if name.startswith(incomplete))


def _recipe_names() -> dict[str, list[str]]:
    """Return the names of the recipes by the verb that reads them."""
    kinds = {"uptrain": UptrainSettings, "eval": EvalSettings}
    return {verb: sorted(settings_of(kind)["recipe"][1].choices) for verb, kind in kinds.items()}


RECIPE = [
    click.Argument(["recipe"], shell_complete=_complete_recipe),
    flag_option("--eval evaluation", "Of two recipes with one name, take the one of `headwise eval`."),
]


@_recipes.command("show", params=RECIPE)
def _show_recipe(recipe: str, evaluation: bool = False) -> None:
    """Print the file of a recipe.

    \b
    headwise recipes show distill > own.yaml
    """
    path, loaded = _load_recipe(recipe, evaluation)
    console.print_lines(path.read_text(encoding="utf-8"))
    console.print_json(loaded)


@_recipes.command("validate", params=RECIPE)
def _validate_recipe(recipe: str, evaluation: bool = False) -> None:
    """Check a recipe: its keys, their types and values.

    \b
    headwise recipes validate own.yaml
    """
    console.print_json(_load_recipe(recipe, evaluation)[1])
    console.print_line(f"{recipe} is valid.")


def _load_recipe(name: str, evaluation: bool) -> tuple[Path, Any]:
    """Return the file and the recipe of a name or file; of two recipes with one name, the one for training."""
    from headwise.eval.settings import find_eval_recipe, is_eval_recipe, load_eval_recipe
    from headwise.recipes.settings import find_uptrain_recipe, load_uptrain_recipe

    known = _recipe_names()
    if not Path(name).is_file() and not any(name in names for names in known.values()):
        near = nearest(name, sorted({name for names in known.values() for name in names}))
        library = "; ".join(f"for `headwise {verb}`: {', '.join(names)}" for verb, names in known.items())
        raise HeadwiseError(f"There is no recipe {name!r}.", f"{near}The library has {library}.")
    trains = not Path(name).is_file() and name in known["uptrain"]
    if evaluation or (not trains and is_eval_recipe(name)):
        return find_eval_recipe(name), load_eval_recipe(name)
    return find_uptrain_recipe(name), load_uptrain_recipe(name)


def main() -> None:
    """Run the console script."""
    cli(prog_name="headwise")
