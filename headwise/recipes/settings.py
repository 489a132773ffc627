"""Recipes: what a training run does, as data. YAML in, checked dataclasses out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headwise.errors import HeadwiseError
from headwise.schema import build, guess, parse

LIBRARY = Path(__file__).parent / "library"
MAX_RECIPE = 1_000_000


@dataclass(frozen=True)
class Init:
    """A model that starts from nothing: a byte-level BPE and a random stock model."""

    vocab_size: int
    config: dict[str, Any]
    """`model_type` and the fields of its stock configuration class, without the vocabulary."""


@dataclass(frozen=True)
class Data:
    """Where the text comes from and how it is cut."""

    text: dict[str, int]
    """Source (see `sources`) to the times it occurs in one pass."""
    length: int = 1024
    """Tokens in a block."""
    separate_documents: bool = True
    """Documents that share a block do not see each other, and each begins at position 0."""
    heldout: str = "builtin"
    """Text that measures progress and is never trained on; of `builtin`, its held-out modules."""
    heldout_blocks: int | None = 64
    """Blocks of it (null: all there are)."""


@dataclass(frozen=True)
class Loss:
    """What is minimised: a sum of terms with these weights. All but cross-entropy need a teacher.

    `kl` is forward KL (teacher || student), over the whole vocabulary or, with `teacher.topk`, over the teacher's
    most likely tokens and one bucket for the rest. `reverse_kl` is KL (student || teacher), `jsd` the
    Jensen-Shannon divergence; `hidden_states` and `attention_outputs` are relative squared errors over all layers.
    """

    kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    hidden_states: float = 0.0
    attention_outputs: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    """Of both distributions in the divergences, which are multiplied by its square."""

    @property
    def needs_teacher(self) -> bool:
        return any((self.kl, self.reverse_kl, self.jsd, self.hidden_states, self.attention_outputs))


@dataclass(frozen=True)
class Teacher:
    """How the teacher takes part."""

    topk: int | None = None
    """Null: it runs beside the student. A number: its most likely tokens at every position are written to disk
    before the student is loaded, for a teacher that does not fit beside it."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (peft) on the attention projections, merged into the weights at the end."""

    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0


@dataclass(frozen=True)
class Layerwise:
    """Stage 1: each attention layer alone learns its parent's answers, as `convert --refit` does it."""

    tokens: int = 1_000_000
    """Tokens of text read through the parent."""
    steps: int = 800
    """Optimizer steps per layer."""


@dataclass(frozen=True)
class Training:
    """One run of AdamW. Budgets are tokens, not steps: `tokens`, or else a `fraction` of `pretraining_tokens`."""

    tokens: int | None = None
    fraction: float | None = None
    """Share of the pretraining, 0.05 or 5%."""
    pretraining_tokens: int | None = None
    """What the model was pretrained on (null: as its own training.json says)."""
    parameters: Literal["all", "attention"] = "all"
    """Which are trained."""
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    seconds: float | None = None
    """Wall clock that the run may take: the number of tokens is lowered early in the run so that it fits."""
    batch_tokens: int = 131072
    """Tokens in one optimizer step, all processes together."""
    micro_batch_tokens: int | None = None
    """Tokens one process puts through the model at once (null: its whole share of the batch)."""
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine`: warm up, then a half cosine. `wsd`: warm up, stay, then linear over the last fifth."""
    warmup: float = 0.02
    """Share of the run in which the learning rate rises."""
    final_learning_rate: float = 0.0
    """Where the schedule ends, as a share of the peak."""
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0
    precision: Literal["bf16", "float32"] = "bf16"
    """`bf16`: master weights in float32, matrix products in bfloat16."""
    compile: bool = False
    log_every: int = 20
    evaluate_every: int | None = None
    """Steps between two measurements on the held-out text (null: only before and after)."""
    save_every: int | None = None
    """Steps between two checkpoints (null: ten in a long run; 0: only when it is stopped)."""
    keep: int = 2
    """Checkpoints kept."""
    report_to: list[str] = field(default_factory=list)
    """tensorboard, wandb: whatever transformers' Trainer knows and is installed."""
    seed: int = 0

    def budget(self, pretrained: int | None = None) -> int:
        """Tokens of the run.

        Args:
            pretrained: what the model says it was pretrained on, where the recipe does not.

        Raises:
            HeadwiseError: a fraction of nobody knows what.
        """
        if self.tokens is not None:
            return self.tokens
        whole = self.pretraining_tokens or pretrained
        if whole is None:
            raise HeadwiseError(
                f"train.fraction is {self.fraction} of a pretraining whose size is not stated.",
                "Add --set train.pretraining_tokens=15T (what the parent saw), or give --tokens 21M.",
            )
        return math.ceil((self.fraction or 0) * whole)


@dataclass(frozen=True)
class Recipe:
    """A whole run: `layerwise`, then `train`. Without `init` it trains the model it is given."""

    about: str
    data: Data
    train: Training | None = None
    layerwise: Layerwise | None = None
    loss: Loss = Loss(cross_entropy=1.0)
    teacher: Teacher = Teacher()
    init: Init | None = None

    @property
    def seed(self) -> int:
        return self.train.seed if self.train else 0

    @property
    def needs_teacher(self) -> bool:
        return self.layerwise is not None or (self.train is not None and self.loss.needs_teacher)


def load(recipe: str | Path | Recipe, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and lay `a.b=c` settings over it.

    Args:
        recipe: the name of one in the library, a YAML file, or one that was read.
        settings: dotted keys with YAML values, later ones win.

    Raises:
        HeadwiseError: no such recipe, not YAML, unknown key, value of the wrong type.
    """
    if isinstance(recipe, Recipe):
        place, mapping = "the recipe", dataclasses.asdict(recipe)
    else:
        path = find(recipe)
        place, mapping = str(path), read(path)
    for setting in settings:
        _lay_over(mapping, setting)
    checked = build(Recipe, mapping, place)
    for wrong, sentence in _contradictions(checked):
        if wrong:
            raise HeadwiseError(f"{place}: {sentence}")
    return checked


def read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe's file; HeadwiseError where there is none."""
    if path.stat().st_size > MAX_RECIPE:
        raise HeadwiseError(f"{path} is larger than {MAX_RECIPE:,} bytes, so it is no recipe.")
    try:
        mapping = parse(path.read_bytes().decode())
    except ValueError as error:
        raise HeadwiseError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(mapping, dict):
        raise HeadwiseError(f"{path} holds no recipe: its top level must be a mapping.")
    return mapping


def _contradictions(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """What no single field can tell: (whether it is wrong, the sentence to say then)."""
    train, loss = recipe.train, recipe.loss
    yield recipe.data.length < 2, f"data.length must be at least 2, got {recipe.data.length}."
    yield train is None and recipe.layerwise is None, "it trains nothing: give train, layerwise or both."
    weights = {name: value for name, value in dataclasses.asdict(loss).items() if name != "temperature"}
    negative = next((name for name, value in weights.items() if value < 0), None)
    yield negative is not None, f"loss.{negative} must not be negative."
    yield not any(weights.values()), f"loss gives no term a weight: {', '.join(weights)}."
    yield loss.temperature <= 0, f"loss.temperature must be above 0, got {loss.temperature}."
    yield recipe.init is not None and recipe.needs_teacher, "a model that starts from nothing has no teacher."
    if train is None:
        return
    yield train.tokens is None and train.fraction is None, "train.tokens is missing (or train.fraction)."
    # With no step asked for, the Trainer would take three passes over the text.
    for name, budget in (("tokens", train.tokens), ("fraction", train.fraction)):
        yield budget is not None and budget <= 0, f"train.{name} must be above 0, got {budget}."
    yield (
        train.lora is not None and train.parameters == "all",
        "train.lora trains adapters on attention: set train.parameters to attention.",
    )
    yield (
        train.compile and bool(loss.attention_outputs),
        "loss.attention_outputs listens to modules, which train.compile melts into one: set it to false.",
    )
    topk = recipe.teacher.topk
    yield topk is not None and topk < 1, f"teacher.topk must be at least 1, got {topk}."
    inside = [name for name in ("hidden_states", "attention_outputs") if weights[name]]
    yield (
        topk is not None and bool(inside),
        f"loss.{', '.join(inside)} needs the teacher beside the student: leave out teacher.topk.",
    )
    whole = [name for name in ("reverse_kl", "jsd") if weights[name]]
    yield (
        topk is not None and bool(whole),
        f"loss.{', '.join(whole)} needs the teacher's whole distribution: leave out teacher.topk.",
    )


def find(recipe: str | Path, library: Path = LIBRARY) -> Path:
    """The file of a recipe given by name or path."""
    for path in (Path(recipe), library / f"{recipe}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in library.glob("*.yaml"))
    raise HeadwiseError(
        f"There is no recipe {str(recipe)!r}.", f"{guess(str(recipe), names)}The library has: {', '.join(names)}."
    )


def _lay_over(mapping: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise HeadwiseError(f"--set {setting} is not of the form a.b=c.", "For example: --set train.tokens=21M")
    try:
        value = parse(text)
    except ValueError:
        raise HeadwiseError(f"--set {setting}: {text!r} is not a YAML value.") from None
    *parents, last = key.split(".")
    for parent in parents:
        if mapping.get(parent) is None:
            mapping[parent] = {}
        mapping = mapping[parent]
        if not isinstance(mapping, dict):
            raise HeadwiseError(f"--set {setting}: {parent} has no keys of its own.")
    mapping[last] = value
