"""Everything that a user decides about an evaluation: defaults, legal values and contradictions, once.

`EvalSettings` holds the options of `evaluate_model` and of `headwise eval`. `EvalRecipe` holds what is measured, as
data in a YAML file of `recipes/` beside this file or of the user; a part that a recipe leaves out is not measured.
Both validate themselves and raise `SettingError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from headwise import fields, schema
from headwise.errors import SettingError
from headwise.eval.tasks.benchmarks import local_task
from headwise.fields import check_fields, is_given, settings_of
from headwise.format import plain, public_command

LIBRARY = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "quick"
BACKENDS = ("hf", "vllm")
DTYPES = ("auto", "bfloat16", "float16", "float32")
# On a CPU the search for the largest batch that fits would take longer than the tasks.
CPU_BATCH_SIZE = 16
# Fields that belong to text of one side, without images.
NOT_WITH_PAIRS = (
    "recipe", "tasks", "online", "include_path", "task_data", "num_fewshot", "limit", "apply_chat_template",
    "batch_size", "backend",
)  # fmt: skip


def parse_limit(word: str) -> float:
    """Return lm-eval's limit: 100 for "100", 0.1 for "0.1".

    Args:
        word: a word of the command line.

    Raises:
        ValueError: the word is not a number.
    """
    return float(word)


def parse_batch_size(word: str) -> int | str:
    """Return lm-eval's batch size: 8 for "8", and "auto" or "auto:4" as they are.

    Args:
        word: a word of the command line.

    Raises:
        ValueError: the word is neither.
    """
    return word if word.startswith("auto") else int(word)


def parse_tasks(word: str) -> list[str]:
    """Return ["a", "b"] for "a,b".

    Args:
        word: a word of the command line.

    Raises:
        ValueError: the word holds no name.
    """
    names = [name.strip() for name in word.split(",") if name.strip()]
    if not names:
        raise ValueError
    return names


def _check_limit(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    if 0 < value < 1:
        return float(value)
    if value < 1 or value != int(value):
        raise ValueError
    return int(value)


def _check_batch_size(value: Any) -> int | str:
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+(\.\d+)?)?", value):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _check_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) and name for name in value):
        raise ValueError
    return tuple(value)


def _check_folders(value: Any) -> tuple[Path, ...]:
    if isinstance(value, str | Path) or not all(isinstance(folder, str | Path) and str(folder) for folder in value):
        raise ValueError
    return tuple(Path(folder).expanduser() for folder in value)


def _check_recipe(value: Any) -> str | Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError
    return value


def _check_shares(value: Any, *, zero: bool) -> tuple[float, ...]:
    for share in value:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError
        if not share and not zero:
            raise ValueError
    if not value:
        raise ValueError
    return tuple(map(float, value))


def _limit(help: str, **more: Any) -> Any:
    wanted = "a number of questions or a share below 1"
    return fields.other(help, check=_check_limit, parse=parse_limit, wanted=wanted, metavar="N", **more)


def _shares(help: str, default: Sequence[float], *, zero: bool) -> Any:
    return fields.other(
        help,
        check=lambda value: _check_shares(value, zero=zero),
        parse=lambda word: [fields.parse_fraction(part) for part in word.split(",")],
        wanted=f"a list of fractions {'from' if zero else 'above'} 0 and up to 1",
        metavar="FRACTIONS",
        default=tuple(default),
    )


@dataclass(frozen=True)
class _Part:
    """A part of a recipe; it checks its fields when it is made."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PerplexityPart(_Part):
    """The text of the perplexity, in blocks."""

    text: str = fields.text("builtin, a .txt or .jsonl file, or hf:DATASET.", metavar="SOURCE", default="builtin")
    split: str = fields.text("The part of builtin.", metavar="SPLIT", default="heldout")
    length: int = fields.length("Tokens in a block; the model's context, if that is shorter.", default=512)
    blocks: int = fields.number("Number of blocks.", default=48)
    stretches: int = fields.number("Points of the curve of loss by position.", default=16)


@dataclass(frozen=True)
class PositionsPart(_Part):
    """Loss by position up to the child's context, on windows that put each token into each interval once."""

    text: str = fields.text("builtin, a .txt or .jsonl file, or hf:DATASET.", metavar="SOURCE", default="builtin")
    split: str = fields.text("The part of builtin.", metavar="SPLIT", default="heldout")
    stretches: int = fields.number("Points of the curve.", default=16)
    windows: int = fields.number("Number of windows.", default=24)


@dataclass(frozen=True)
class PasskeyPart(_Part):
    """The grid of the task headwise_passkey."""

    lengths: tuple[float, ...] = _shares(
        "Lengths of the prompts, as shares of the child's context.", (0.25, 0.5, 1.0), zero=False
    )
    depths: tuple[float, ...] = _shares(
        "Shares of the filler text before the key.", (0.0, 0.25, 0.5, 0.75, 1.0), zero=True
    )
    samples: int = fields.number("Prompts at each point of the grid.", default=10)


@dataclass(frozen=True)
class DiagnosticsPart(_Part):
    """Child and parent on the same tokens of the recipe's `perplexity` text."""

    blocks: int = fields.number("Number of blocks whose next-token distributions are compared.", default=16)
    layer_blocks: int = fields.number(
        "Number of these blocks whose layer outputs and attention entropy are compared.", default=2
    )


@dataclass(frozen=True)
class GenerationPart(_Part):
    """Greedy continuations of held-out text."""

    prompts: int = fields.number("Number of prompts.", default=16)
    prompt_tokens: int = fields.number("Tokens in a prompt.", default=64)
    new_tokens: int = fields.number("Tokens to write after each prompt.", default=48)


@dataclass(frozen=True)
class AcceptancePart(_Part):
    """The child as draft model of its parent, on the first prompts of `generation`."""

    prompts: int = fields.number("Number of prompts.", default=8)
    new_tokens: int = fields.number("Tokens to write after each prompt.", default=48)
    draft_tokens: int = fields.number("Tokens that the child drafts in one step.", default=4)


@dataclass(frozen=True)
class EvalRecipe:
    """What an evaluation measures.

    Attributes:
        about: one sentence for `headwise recipes list`.
        tasks: tasks of lm-eval or of this package.
        online: more tasks, which download their questions; they run with the option `online` only.
        num_fewshot: examples in each prompt; None: the number that each task sets.
        limit: questions of each task, a number or a share below 1; None: all.
        perplexity: None: not measured.
        positions: None: not measured.
        passkey: grid of the passkey task; None: the task's own.
        diagnostics: None: not measured.
        generation: None: not measured.
        acceptance: None: not measured.

    Raises:
        SettingError: a value is not legal, or a part needs another one that is missing.
    """

    about: str
    tasks: list[str] = field(default_factory=list)
    online: list[str] = field(default_factory=list)
    num_fewshot: int | None = fields.number("Examples in each prompt.", minimum=0)
    limit: float | None = _limit("Questions of each task.")
    perplexity: PerplexityPart | None = None
    positions: PositionsPart | None = None
    passkey: PasskeyPart | None = None
    diagnostics: DiagnosticsPart | None = None
    generation: GenerationPart | None = None
    acceptance: AcceptancePart | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, needed in (("diagnostics", "perplexity"), ("acceptance", "generation")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise SettingError(name, f"`{name}` uses the text of `{needed}`, which is missing.")

    @property
    def needs_both_models(self) -> bool:
        """Return whether child and parent must be in memory at the same time."""
        return self.diagnostics is not None or self.acceptance is not None

    def recorded(self) -> dict[str, Any]:
        """Return the values that decide the figures: everything but the description."""
        return {name: value for name, value in plain(asdict(self)).items() if name != "about"}


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation does.

    A field that is None was not given; the recipe, the tasks or the device decide then.

    Raises:
        SettingError: a value is not legal or contradicts another one.
    """

    baseline: str | Path | None = fields.model("The parent, measured in the same run.")
    # What to measure
    recipe: str | Path | None = fields.other(
        "quick, standard, long-context, retrieval or a FILE [quick].",
        check=_check_recipe,
        parse=str,
        wanted="the name of a recipe or a YAML file",
        choices=[path.stem for path in sorted(LIBRARY.glob("*.yaml"))],
        metavar="RECIPE",
        section="What to measure",
    )
    tasks: tuple[str, ...] = fields.other(
        "Tasks of lm-eval.",
        check=_check_names,
        parse=parse_tasks,
        wanted="a list such as hellaswag,arc_easy",
        metavar="NAMES",
        section="What to measure",
        default=(),
    )
    online: bool = fields.flag(
        "Also the recipe's tasks that download their questions (RULER).", section="What to measure"
    )
    include_path: tuple[Path, ...] = fields.other(
        "A folder with tasks of yours; may be repeated.",
        check=_check_folders,
        parse=Path,
        wanted="a list of folders",
        metavar="DIR",
        section="What to measure",
        multiple=True,
        default=(),
    )
    task_data: Path | None = fields.folder(
        "Read questions from files such as DIR/hellaswag.jsonl [the Hub].",
        metavar="DIR",
        section="What to measure",
    )
    num_fewshot: int | None = fields.number(
        "Examples in each prompt [each task's own].", minimum=0, section="What to measure"
    )
    limit: float | None = _limit("Questions of each task [all].", section="What to measure")
    apply_chat_template: bool = fields.flag(
        "Put the questions into the model's chat template, for both models alike.", section="What to measure"
    )
    fail_above: float | None = fields.fraction(
        "Exit with code 1 if a loss of quality is significantly larger.", zero=True, section="What to measure"
    )
    pairs: Path | None = fields.folder(
        'A .jsonl file with "source" and "target", for an encoder-decoder.',
        metavar="FILE",
        wanted="the path of a file",
        section="What to measure",
    )
    images: Path | None = fields.folder(
        'A .jsonl file with "image" (a path) and "text", for a vision-language model.',
        metavar="FILE",
        wanted="the path of a file",
        section="What to measure",
    )
    # How to run it
    batch_size: int | str | None = fields.other(
        f"lm-eval's [{CPU_BATCH_SIZE} on a CPU, auto on a GPU].",
        check=_check_batch_size,
        parse=parse_batch_size,
        wanted="a number of at least 1, auto or auto:N",
        metavar="N",
        section="How to run it",
    )
    backend: str = fields.choice("What runs the tasks [hf].", BACKENDS, default="hf", section="How to run it")
    dtype: str | None = fields.choice("Precision [float32 on a CPU, else auto].", DTYPES, section="How to run it")
    cache: bool = fields.flag(
        "Measure the parent again, and keep nothing of an interrupted run.",
        default=True,
        flag="--no-cache",
        section="How to run it",
    )
    # Output
    report: Path | None = fields.folder("The report's folder [NAME-eval].", metavar="DIR", section="Output")
    force: bool = fields.flag("Replace that folder.", section="Output")
    seed: int = fields.number("Of everything random [0].", minimum=0, default=0)
    device: str | None = fields.device()

    def __post_init__(self) -> None:
        check_fields(self)
        given = "pairs" if self.pairs is not None else "images"
        for name in (*NOT_WITH_PAIRS, *(["images"] if given == "pairs" else [])):
            if self.reads_file and is_given(self, name):
                raise SettingError(
                    name,
                    f"`{name}` has no effect with `{given}`, of which the perplexity of the "
                    f"{'targets' if given == 'pairs' else 'texts'} is measured.",
                    f"Leave out `{name}`.",
                )

    @property
    def reads_file(self) -> bool:
        """Return whether only a file of pairs is measured."""
        return self.pairs is not None or self.images is not None

    @property
    def recipe_name(self) -> str | Path | None:
        """Return the recipe in force: the given one, the default, or None beside tasks or a file of pairs."""
        return self.recipe or (None if self.tasks or self.reads_file else DEFAULT_RECIPE)

    def choose_recipe(self) -> EvalRecipe:
        """Load the recipe and add the given tasks and options to it.

        With `task_data`, a task of the recipe whose questions are in that folder reads them there.

        Raises:
            HeadwiseError: there is no such recipe.
            SettingError: a value of the recipe is not legal, or `online` adds nothing to it.
        """
        name = self.recipe_name
        recipe = load_eval_recipe(name) if name is not None else EvalRecipe(about="Tasks by name, or pairs.")
        if self.online and not recipe.online:
            place = "without a recipe there are none" if name is None else f"the recipe {name} has none"
            raise SettingError(
                "online",
                f"`online` is True, which adds a recipe's tasks that download their questions, but {place}.",
                "Leave out `online`.",
            )
        tasks = [*recipe.tasks, *(recipe.online if self.online else [])]
        if self.task_data is not None:
            tasks = [local_task(task, self.task_data) for task in tasks]
        return replace(
            recipe,
            tasks=list(dict.fromkeys([*tasks, *self.tasks])),
            num_fewshot=recipe.num_fewshot if self.num_fewshot is None else self.num_fewshot,
            limit=recipe.limit if self.limit is None else self.limit,
        )

    def resolve(self, recipe: EvalRecipe, device: str) -> EvalSettings:
        """Return the settings with every value that a recipe and a device decide.

        Args:
            recipe: result of `choose_recipe`.
            device: where the models run, such as "cpu" or "cuda:1".

        Returns:
            Settings whose `dtype` and `device` are not None, nor `batch_size` where tasks may run.
        """
        on_cpu = device == "cpu"
        return replace(
            self,
            num_fewshot=recipe.num_fewshot,
            limit=recipe.limit,
            batch_size=None if self.reads_file else self.batch_size or (CPU_BATCH_SIZE if on_cpu else "auto"),
            dtype=self.dtype or ("float32" if on_cpu else "auto"),
            device=device,
        )

    def harness_options(self) -> dict[str, Any]:
        """Return the options of lm-eval, under its names."""
        names = ("num_fewshot", "limit", "batch_size", "backend", "dtype", "device", "seed", "apply_chat_template")
        return {name: getattr(self, name) for name in names}

    def recorded(self, recipe: EvalRecipe) -> dict[str, Any]:
        """Return what the report keeps of the settings.

        Args:
            recipe: result of `choose_recipe`.
        """
        return {
            **self.harness_options(),
            "tasks": recipe.tasks,
            "include_path": [str(folder) for folder in self.include_path],
            "recipe": recipe.recorded(),
        }

    def command(self, child: str | Path) -> str:
        """Return the command line that repeats the evaluation, without the folders of absolute paths.

        Args:
            child: the model that was evaluated.
        """
        words = ["headwise", "eval", str(child)]
        values = {name: getattr(self, name) for name in settings_of(self)} | {"recipe": self.recipe_name}
        for name, (declared, setting) in settings_of(self).items():
            if name in ("force", "cache") or (name == "backend" and values[name] == declared.default):
                continue
            flag, value = f"--{name.replace('_', '-')}", values[name]
            if setting.is_flag:
                words += [flag] if value else []
            elif setting.multiple:
                words += [word for item in value for word in (flag, str(item))]
            elif name == "tasks":
                words += [flag, ",".join(value)] if value else []
            elif value is not None:
                words += [flag, f"{value:.6g}" if isinstance(value, float) else str(value)]
        return public_command(words)


def load_eval_recipe(recipe: str | Path) -> EvalRecipe:
    """Read an evaluation recipe.

    Args:
        recipe: the name of a recipe in the library, or a YAML file.

    Raises:
        HeadwiseError: there is no such recipe, or it is not YAML.
        SettingError: a key is unknown or missing, or a value is not legal.
    """
    return schema.load_file(EvalRecipe, find_eval_recipe(recipe))


def find_eval_recipe(recipe: str | Path) -> Path:
    """Return the file of an evaluation recipe.

    Args:
        recipe: the name of a recipe in the library, or a YAML file.

    Raises:
        HeadwiseError: there is no such recipe.
    """
    return schema.find_file(recipe, LIBRARY)


def is_eval_recipe(recipe: str) -> bool:
    """Return whether a recipe is an evaluation recipe: a name of the library, or a file without training data.

    Args:
        recipe: a name or a YAML file.
    """
    if not Path(recipe).is_file():
        return (LIBRARY / f"{recipe}.yaml").is_file()
    return "data" not in schema.read_mapping(Path(recipe))
