"""Evaluation recipes: what `headwise eval` measures, as data. YAML in, checked dataclasses out.

A part that a recipe leaves out is not measured. The YAML files lie in `recipes/` beside this file; their checks are
those of the training recipes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.recipes import settings as schema

LIBRARY = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Text:
    """Text whose perplexity is measured, in blocks."""

    text: str = "builtin"
    """builtin, a .txt or .jsonl file, or hf:DATASET."""
    split: str = "heldout"
    """Of builtin."""
    length: int = 512
    """Tokens in a block, or the model's context where that is shorter."""
    blocks: int = 48
    stretches: int = 16
    """Points of the curve of loss by position."""


@dataclass(frozen=True)
class Positions:
    """Loss by position up to the child's whole context, in windows that let each token stand at each stretch."""

    text: str = "builtin"
    split: str = "heldout"
    stretches: int = 16
    windows: int = 24


@dataclass(frozen=True)
class Passkey:
    """The grid of task headwise_passkey, whose lengths are shares of the child's context."""

    lengths: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 10


@dataclass(frozen=True)
class Diagnostics:
    """Parent and child on the same tokens of the recipe's `perplexity` text."""

    blocks: int = 16
    """How many of its blocks: their next-token distributions."""
    layer_blocks: int = 2
    """How many of these: errors by layer and attention entropy."""


@dataclass(frozen=True)
class Generation:
    """Greedy continuations of held-out text."""

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 48


@dataclass(frozen=True)
class Acceptance:
    """The child as a draft for its parent, on the first prompts of `generation`."""

    prompts: int = 8
    new_tokens: int = 48
    draft_tokens: int = 4


@dataclass(frozen=True)
class Recipe:
    """A whole evaluation."""

    about: str
    tasks: list[str] = field(default_factory=list)
    """Of lm-eval, or of this package."""
    online: list[str] = field(default_factory=list)
    """More tasks, that download their questions: measured with --online."""
    num_fewshot: int | None = None
    """Examples in each prompt; null: each task's own number."""
    limit: float | None = None
    """Questions of each task: a number, or a share below 1."""
    perplexity: Text | None = None
    positions: Positions | None = None
    passkey: Passkey | None = None
    diagnostics: Diagnostics | None = None
    generation: Generation | None = None
    acceptance: Acceptance | None = None

    @property
    def together(self) -> bool:
        """Whether parent and child must be in memory at once."""
        return self.diagnostics is not None or self.acceptance is not None


def load(recipe: str | Path) -> Recipe:
    """Read a recipe, by the name of one in the library or a YAML file.

    Raises:
        HeadwiseError: no such recipe, not YAML, unknown key, value of the wrong type, parts that need others.
    """
    path = find(recipe)
    checked = schema.build(Recipe, schema.read(path), str(path))
    if checked.diagnostics and not checked.perplexity:
        raise HeadwiseError(f"{path}: diagnostics reads the text of perplexity, which is missing.")
    if checked.acceptance and not checked.generation:
        raise HeadwiseError(f"{path}: acceptance takes the prompts of generation, which is missing.")
    return checked


def find(recipe: str | Path) -> Path:
    """The file of an evaluation recipe given by name or path."""
    return schema.find(recipe, LIBRARY)


def is_evaluation(recipe: str) -> bool:
    """Whether a name is that of an evaluation recipe alone, or a file holds one: it says what to measure, and not
    what to train on."""
    if not Path(recipe).is_file():
        return not (schema.LIBRARY / f"{recipe}.yaml").is_file() and (LIBRARY / f"{recipe}.yaml").is_file()
    return "data" not in schema.read(Path(recipe))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the figures: everything but the description."""
    return {name: value for name, value in asdict(recipe).items() if name != "about"}
