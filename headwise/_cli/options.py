"""The command line's options, and which of them contradict or need each other.

An option that was not typed is not passed on, so every default lives in the library function. An option that
would be ignored is refused: each says which `--to` it acts on; `CLASHES` and `NEEDS` list the pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from headwise._cli.app import Option, choice, flag, number, parsed, section

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
    "private": "push_to_hub",
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
        Option("--push-to-hub", "Upload the result to a repository.", metavar="REPO"),
        flag("--private", "Make a new repository private."),
    ),
    flag("--allow-nan", "Convert weights that are not finite."),
    flag("--allow-pickle", "Read .bin files (weights only, no code)."),
    SEED,
    DEVICE,
    *SOURCE,
]

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
    if "push_to_hub" in options and "verify" in options:
        raise click.UsageError("--push-to-hub sends what was verified: leave out --no-verify.")
    if ("rope_theta" in options) != (options.get("rope") == "base"):
        raise click.UsageError("--rope base and --rope-theta THETA belong together.")


def _typed(name: str) -> str:
    return "--" + name.replace("_", "-")
