"""The `headwise` command: parse, call, print. Nothing else.

An option that was not typed is not passed on, so every default lives in the library function. An option that
would be ignored is refused: each says which `--to` it acts on; `CLASHES` and `NEEDS` list the pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from headwise import __version__, show, ui
from headwise.command import Option, Verbs, choice, flag, number, parsed, section
from headwise.errors import GateFailed

LAYOUTS = ("gqa", "mqa", "mha", "mla")
FEWER, LATENT, LOSSY = ("gqa", "mqa"), ("mla",), ("gqa", "mqa", "mla")
MERGES = ("optimal", "aligned", "mean", "first", "random")
LATENTS = ("optimal", "transmla", "partial-rope", "partial-rope-high", "partial-rope-low", "partial-rope-uniform")
METHODS = {"gqa": MERGES, "mqa": MERGES, "mla": LATENTS}
ROPE_RULES = ("auto", "base", "ntk", "linear", "dynamic", "yarn", "llama3", "longrope")

CHANGES = ("to", "context", "sliding_window", "dtype")
NEEDS = {
    "rank": "rope_dim",
    "rope_dim": "rank",
    "rope": "context",
    "rope_theta": "rope",
    "window_layers": "sliding_window",
}
CLASHES = {
    "cache": ("rank", "rope_dim"),
    "exact": ("cache", "rank", "rope_dim", "method", "calibrate", "calibration_tokens", "moments", "refit"),
    "moments": ("save_moments", "calibrate", "calibration_tokens"),
}


def share(value: str) -> float:
    """ "12.5%" or "0.125" -> 0.125."""
    fraction = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    if not 0 < fraction <= 1:
        raise ValueError
    return fraction


def memory(value: str) -> int:
    """ "24GiB" or "24GB" -> bytes."""
    number_, unit = value[:-3], value[-3:]
    scale = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}.get(unit)
    if scale is None:
        number_, scale = value[:-2], {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[value[-2:].upper()]
    return round(float(number_) * scale)


def refit(value: str) -> str | int:
    """ "auto", "off", or a number of steps."""
    if value in ("auto", "off"):
        return value
    if int(value) < 1:
        raise ValueError
    return int(value)


MODEL = click.Argument(["model"])
OUT = click.Argument(["out"], type=Path)
SOURCE = [
    Option("--revision", "Branch, tag or commit of a Hub repository.", metavar="REV"),
    Option("--token", "Hub token; HF_TOKEN and `hf auth login` work too.", metavar="TOKEN"),
]
DEVICE = Option("--device", "cpu, cuda or cuda:N [a GPU if there is one].", metavar="DEVICE")
SEED = number("--seed", "Of everything random [0].", minimum=0)

CONVERT = [
    *section(
        "Attention",
        choice("--to", LAYOUTS, "What to convert to.", to=LAYOUTS),
        number("--groups", "KV heads afterwards (GQA-8 has 8).", to=("gqa",)),
        choice(
            "--method",
            sum(METHODS.values(), ()),
            f"How: {', '.join(MERGES)}; for mla: {', '.join(METHODS['mla'])} [optimal].",
            metavar="METHOD",
        ),
        choice("--grouping", ("optimal", "contiguous"), "Which heads share [optimal].", to=FEWER),
        to=LOSSY,
    ),
    *section(
        "Latent attention (--to mla)",
        number("--rank", "Width of the latent (kv_lora_rank)."),
        number("--rope-dim", "Width of the shared rotary key (qk_rope_head_dim)."),
        parsed("--cache", share, "a share such as 12.5%", "Cache to keep; searches the two above.", "SHARE"),
        flag("--exact", "The full rank: nothing is lost."),
        choice("--rope-frequencies", ("default", "free"), "free: better, and few engines read it [default]."),
        flag("--pad-values", "Pad value heads with zeros for engines that need it."),
        to=LATENT,
    ),
    *section(
        "Calibration",
        Option("--calibrate", "builtin, none, a text or JSONL FILE, or hf:DATASET [builtin].", metavar="TEXT"),
        number("--calibration-tokens", "How much of it to read."),
        Option("--save-moments", "Keep what was measured in a folder.", type=Path, metavar="DIR"),
        Option("--moments", "Use what was measured before.", type=Path, metavar="DIR"),
        parsed(
            "--refit", refit, "auto, off or a number of steps", "Regress each layer on its parent [auto].", "STEPS"
        ),
        to=LOSSY,
    ),
    *section(
        "Positions",
        number("--context", "Rescale RoPE to this many tokens."),
        choice("--rope", ROPE_RULES, f"The rule: {', '.join(ROPE_RULES)} [auto].", metavar="RULE"),
        Option("--rope-theta", "The base of --rope base.", type=float, metavar="THETA"),
        number("--sliding-window", "Let layers see this many tokens back; 0: all of them.", minimum=0),
        Option("--window-layers", "all, alternate, or a list such as 0,2,4 [all].", metavar="LAYERS"),
    ),
    *section(
        "Output",
        choice("--dtype", ("bfloat16", "float16", "float32"), "Precision [the source's]."),
        Option("--max-shard-size", "Largest weight file [5GB].", metavar="SIZE"),
        flag("--dry-run", "Print the plan and write nothing."),
        flag("--force", "Replace OUT once the new folder is complete."),
        flag("--resume", "Finish what an interrupted run began."),
        Option("--no-verify verify", "Do not check the result.", is_flag=True, flag_value=False),
    ),
    flag("--allow-nan", "Convert weights that are not finite."),
    flag("--allow-pickle", "Read .bin files (weights only, no code)."),
    SEED,
    DEVICE,
    *SOURCE,
]


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
    from headwise.convert.plan import inspect

    plot = options.pop("plot", None)
    if plot and "context" not in options:
        raise click.UsageError("--plot draws what --context N computes: give both.")
    found = inspect(**options)
    show.inspection(found)
    if plot:
        from headwise.eval.plots import draw_reach

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
    refuse_ignored(options)
    from headwise.convert.pipeline import convert

    with ui.progress() as progress:
        outcome: Any = convert(**options, progress=progress)
    (show.plan if "dry_run" in options else show.outcome)(outcome)
    ui.result(outcome)


@cli.command(params=[OUT, Option("--against", "The parent, to compare with.", metavar="MODEL"), *SOURCE])
def verify(**options: Any) -> None:
    """Reload OUT with the stock classes and check its promises."""
    if "against" not in options and options.keys() & {"revision", "token"}:
        raise click.UsageError("--revision and --token are the parent's: they need --against MODEL.")
    from headwise.convert.verify import verify

    with ui.progress() as progress:
        verification = verify(**options, progress=progress)
    show.verification(verification)
    ui.result(verification)
    if not verification.passed:
        raise GateFailed(f"{options['out']} failed its checks.")


@cli.command(
    params=[
        OUT,
        Option("--baseline", "The parent, measured in the same run.", metavar="MODEL"),
        number("--context", "Tokens in the cache [1024]."),
        number("--batch", "Sequences at once [1]."),
        parsed("--memory", memory, "a size such as 24GiB", "Also compare at the largest batch that fits.", "SIZE"),
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

    from headwise.eval.bench import bench

    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    with ui.progress() as progress:
        measured = bench(options.pop("out"), options.pop("baseline"), **options, progress=progress)
    show.bench(measured)
    ui.result(measured)


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
    from headwise.demo import demo

    with ui.progress() as progress:
        outcome = demo(**options, progress=progress)
    show.demo(outcome)
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
    """The recipes for training: list, show, validate."""


@recipes.command("list")
def list_recipes() -> None:
    """Name every recipe and what it is for."""
    from headwise.recipes.schema import LIBRARY, load

    about = {path.stem: load(path).about.strip() for path in sorted(LIBRARY.glob("*.yaml"))}
    ui.table(("recipe", "about"), about.items())
    ui.result(about)


RECIPE = click.Argument(["recipe"])


@recipes.command("show", params=[RECIPE])
def show_recipe(recipe: str) -> None:
    """Print a recipe as it stands in its file."""
    from headwise.recipes.schema import find, load

    ui.say_block(find(recipe).read_text(encoding="utf-8"))
    ui.result(load(recipe))


@recipes.command("validate", params=[RECIPE])
def validate_recipe(recipe: str) -> None:
    """Check a recipe: its keys, their types and values."""
    from headwise.recipes.schema import load

    ui.result(load(recipe))
    ui.say(f"{recipe} is valid.")


def refuse_ignored(options: dict[str, Any]) -> None:
    """A typed option that would have no effect is a mistake, said in one sentence."""
    to = options.get("to")
    if not options.keys() & set(CHANGES):
        raise click.UsageError("There is nothing to change: give --to, --context, --sliding-window or --dtype.")
    for option in CONVERT:
        if option.name in options and isinstance(option, Option) and option.to and to not in option.to:
            acts = " or ".join(f"--to {layout}" for layout in option.to)
            raise click.UsageError(f"{option.opts[0]} acts only with {acts}.")
    if to == "gqa" and "groups" not in options:
        raise click.UsageError("--to gqa needs --groups N; `headwise inspect MODEL` lists the counts it can have.")
    if to == "mla" and not options.keys() & {"exact", "cache", "rank", "rope_dim"}:
        raise click.UsageError("--to mla needs --cache SHARE, or --rank N and --rope-dim N, or --exact.")
    if to in METHODS and options.get("method", "optimal") not in METHODS[to]:
        raise click.UsageError(f"--to {to} has no method {options['method']!r}, but {', '.join(METHODS[to])}.")
    for name, other in ((a, b) for a, others in CLASHES.items() for b in others):
        if name in options and other in options:
            raise click.UsageError(f"{_typed(name)} and {_typed(other)} contradict each other: give one of them.")
    for name, other in NEEDS.items():
        if name in options and other not in options:
            raise click.UsageError(f"{_typed(name)} needs {_typed(other)}.")
    if options.get("calibrate") == "none" and options.keys() & {"calibration_tokens", "save_moments"}:
        raise click.UsageError("--calibrate none reads no text and measures nothing: leave it or the other out.")
    if ("rope_theta" in options) != (options.get("rope") == "base"):
        raise click.UsageError("--rope base and --rope-theta THETA belong together.")


def _typed(name: str) -> str:
    return "--" + name.replace("_", "-")


def main() -> None:
    """The console script."""
    cli(prog_name="headwise")
