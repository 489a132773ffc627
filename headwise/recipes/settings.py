"""Everything that a user decides about an uptraining: defaults, legal values and contradictions, once.

A `Recipe` is what a training run does, as a YAML file or in Python. `UptrainSettings` is a recipe, the changes that
the call makes in it, and how the run is started. Both check themselves when they are made. The command line,
`uptrain_model`, headwise.json and the identity of a resumed run are made from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwise import fields, schema
from headwise.convert.verify.verification import CHECKS
from headwise.errors import SettingError
from headwise.fields import check_fields
from headwise.format import parse_bytes
from headwise.text.sources import Data
from headwise.train.settings import LAUNCH_KINDS, Lora, Loss, TeacherSettings, Training

__all__ = [
    "LIBRARY",
    "Data",
    "Layerwise",
    "Lora",
    "Loss",
    "TeacherSettings",
    "Training",
    "UptrainRecipe",
    "UptrainSettings",
    "find_uptrain_recipe",
    "load_uptrain_recipe",
]

LIBRARY = Path(__file__).parent / "library"
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Layerwise:
    """The first stage: every attention layer is regressed on its parent's output, as `convert` does with `refit`.

    Raises:
        SettingError: a value is not legal.
    """

    tokens: int = fields.number("Tokens of text read through the parent.", default=1_000_000)
    steps: int = fields.number("Optimizer steps for each layer.", default=800)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class UptrainRecipe:
    """What a training run does: `layerwise`, then `train`, on the text of `data`.

    Raises:
        SettingError: the recipe trains nothing, or two sections contradict each other.
    """

    about: str
    data: Data
    train: Training | None = None
    layerwise: Layerwise | None = None
    loss: Loss = field(default_factory=lambda: Loss(cross_entropy=1.0))
    teacher: TeacherSettings = field(default_factory=TeacherSettings)

    def __post_init__(self) -> None:
        for name, kind in SECTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name in ("train", "layerwise")):
                raise schema.not_legal(name, value, "a text" if kind is str else f"a {kind.__name__}")
        if self.train is None and self.layerwise is None:
            raise SettingError("train", "The recipe trains nothing: give `train`, `layerwise` or both.")
        if self.train is None:
            return
        if self.train.compile and self.loss.attention_outputs:
            raise SettingError(
                "train.compile",
                "`loss.attention_outputs` needs the modules that `train.compile` fuses: leave one of them out.",
            )
        if self.teacher.topk is not None:
            for term in ("hidden_states", "attention_outputs"):
                if self.loss.weights[term]:
                    raise SettingError(
                        "teacher.topk",
                        f"`loss.{term}` needs the teacher beside the student: leave out `teacher.topk`.",
                    )
            for term in ("reverse_kl", "jsd"):
                if self.loss.weights[term]:
                    raise SettingError(
                        "teacher.topk",
                        f"`loss.{term}` needs the teacher's whole distribution: leave out `teacher.topk`.",
                    )

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.train.seed if self.train else 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a stage compares with a teacher."""
        return self.layerwise is not None or (self.train is not None and self.loss.needs_teacher)

    @property
    def needs_teacher_in_memory(self) -> bool:
        """Whether the teacher is in memory while the whole model is trained."""
        return self.train is not None and self.loss.needs_teacher and self.teacher.topk is None

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, every value in force."""
        return asdict(self)


SECTIONS: dict[str, type] = {
    "about": str,
    "data": Data,
    "train": Training,
    "layerwise": Layerwise,
    "loss": Loss,
    "teacher": TeacherSettings,
}


def find_uptrain_recipe(recipe: str | Path) -> Path:
    """Return the file of a training recipe that is given by name or path.

    Args:
        recipe: a name in the library, or a YAML file.

    Raises:
        HeadwiseError: there is no such recipe.
    """
    return schema.find_file(recipe, LIBRARY)


def load_uptrain_recipe(recipe: str | Path | UptrainRecipe, assignments: Sequence[str] = ()) -> UptrainRecipe:
    """Read a training recipe and lay `a.b=c` assignments over it.

    Args:
        recipe: a name in the library, a YAML file, or a recipe.
        assignments: dotted keys with YAML values; later ones win.

    Returns:
        The checked recipe.

    Raises:
        HeadwiseError: there is no such recipe, or its file is not a YAML mapping.
        SettingError: a key is unknown or missing, or a value is not legal.
    """
    mapping, where = _read(recipe)
    return schema.build(UptrainRecipe, schema.assign(mapping, assignments), where, assignments)


def _read(recipe: str | Path | UptrainRecipe) -> tuple[dict[str, Any], str]:
    """Return a recipe as plain data, and its file for error messages."""
    if isinstance(recipe, UptrainRecipe):
        return asdict(recipe), "the recipe"
    path = find_uptrain_recipe(recipe)
    return schema.read_mapping(path), str(path)


def _check_recipe(value: Any) -> str | Path | UptrainRecipe:
    if not isinstance(value, str | Path | UptrainRecipe) or value == "":
        raise ValueError
    return value


def _check_words(value: Any) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(word, str) and word for word in words):
        raise ValueError
    return words


def _check_shard_size(value: Any) -> int | str:
    if isinstance(value, bool) or parse_bytes(value) < 1:
        raise ValueError
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class UptrainSettings:
    """What `headwise uptrain` does: a recipe, what the call changes in it, and how the run is started.

    Attributes:
        plan: the recipe with everything laid over it that the other fields say; made with the object.

    Raises:
        SettingError: a value is not legal, has no effect, or contradicts another one.
        HeadwiseError: the recipe cannot be read.
    """

    recipe: str | Path | UptrainRecipe = fields.other(
        "A name of `headwise recipes list`, or a YAML file [distill].",
        default="distill",
        check=_check_recipe,
        wanted="a recipe, its name or its file",
        metavar="RECIPE",
        parse=str,
        choices=[path.stem for path in sorted(LIBRARY.glob("*.yaml"))],
        section="Training",
    )
    teacher: str | Path | None = fields.model("The parent [the source that MODEL records].", section="Training")
    tokens: int | None = fields.number(
        "Budget in tokens, such as 21M (21,000,000) [the recipe's].", parse=schema.parse_count, section="Training"
    )
    fraction: float | None = fields.fraction(
        "Budget as a fraction of the pretraining, such as 5%.", section="Training"
    )
    text: Sequence[str] = fields.other(
        "Training text: builtin, mixture, packages, self, a FILE (txt, jsonl, parquet) or hf:DATASET; repeatable "
        "[the recipe's].",
        default=(),
        check=_check_words,
        wanted="a text source or a list of them",
        metavar="SOURCE",
        parse=str,
        multiple=True,
        section="Training",
    )
    heldout: str | None = fields.text(
        "Text that measures progress, likewise [the recipe's].", metavar="SOURCE", section="Training"
    )
    settings: Sequence[str] = fields.other(
        "Change a field of the recipe; may be repeated.",
        default=(),
        check=_check_words,
        wanted="a list of a.b=c",
        metavar="a.b=c",
        parse=str,
        multiple=True,
        flag="--set",
        section="Training",
    )
    launch: str | None = fields.choice(
        "Start processes through accelerate: single, ddp or fsdp2.", LAUNCH_KINDS, section="Several processes"
    )
    processes: int | None = fields.number("Number of processes [one for each GPU].", section="Several processes")
    seed: int | None = fields.number("Seed of everything random [the recipe's, 0].", minimum=0)
    device: str | None = fields.choice(
        "Device of one process [an accelerator if there is one].", ("cpu", "cuda"), metavar="DEVICE"
    )
    max_shard_size: int | str = fields.other(
        f"Largest weight file [{SHARD_SIZE}].",
        default=SHARD_SIZE,
        check=_check_shard_size,
        wanted="a size such as 5GB",
        metavar="SIZE",
        parse=str,
    )
    accept: Sequence[str] = fields.several(
        f"Publish although this check fails, and record it: {', '.join(CHECKS)}; may be repeated.",
        CHECKS,
        metavar="CHECK",
    )
    force: bool = fields.flag("Replace OUT once the new folder is complete.")
    resume: bool = fields.flag("Continue an interrupted run.")
    plan: UptrainRecipe = field(init=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokens is not None and self.fraction is not None:
            raise SettingError("tokens", "`tokens` and `fraction` contradict each other: give one of them.")
        if self.processes is not None and self.launch is None:
            raise SettingError("processes", "`processes` needs `launch`.")
        if self.launch == "single" and self.processes not in (None, 1):
            raise SettingError(
                "processes", f"`processes` is {self.processes}, and `launch` single starts one: give ddp or fsdp2."
            )
        if self.launch is not None and self.device is not None:
            raise SettingError("device", "`launch` chooses the device of its processes: leave out `device`.")
        if self.launch is not None and isinstance(self.recipe, UptrainRecipe):
            raise SettingError(
                "launch", "`launch` starts processes that read the recipe from its file: give a name or a file."
            )
        mapping, where = _read(self.recipe)
        schema.assign(mapping, self.settings)
        for name in ("tokens", "fraction", "seed"):
            if getattr(self, name) is not None and mapping.get("train") is None:
                raise SettingError(
                    name,
                    f"The recipe has no `train` section, so `{name}` has no effect.",
                    None if name == "seed" else "Give layerwise.tokens instead.",
                )
        schema.assign(mapping, self._from_fields())
        object.__setattr__(self, "plan", schema.build(UptrainRecipe, mapping, where, self.settings))

    @property
    def name(self) -> str:
        """What the record calls the recipe."""
        return "its own" if isinstance(self.recipe, UptrainRecipe) else Path(self.recipe).stem

    @property
    def assignments(self) -> tuple[str, ...]:
        """Everything that is laid over the recipe, as `a.b=c`."""
        return (*self.settings, *self._from_fields())

    def _from_fields(self) -> Iterator[str]:
        if self.tokens is not None or self.fraction is not None:
            yield f"train.tokens={json.dumps(self.tokens)}"
            yield f"train.fraction={json.dumps(self.fraction)}"
        if self.seed is not None:
            yield f"train.seed={self.seed}"
        if self.text:
            # YAML does not know JSON's pairs of escapes for what lies beyond 16 bits.
            yield f"data.text={json.dumps(dict.fromkeys(self.text, 1), ensure_ascii=False)}"
        if self.heldout is not None:
            yield f"data.heldout={json.dumps(self.heldout, ensure_ascii=False)}"
