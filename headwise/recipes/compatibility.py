"""Whether a recipe, a model and its teacher belong together: asked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headwise.errors import HeadwiseError
from headwise.io.tokenizer import load_tokenizer
from headwise.recipes.layerwise import check_layerwise
from headwise.recipes.settings import Data, Recipe
from headwise.text.sources import shared
from headwise.train.student import ModelFolder

_WRONG_PARENT = "Name the model that the folder was converted from."


def check_text(data: Data) -> None:
    """Refuse files that are not there, and a text that is both trained on and held out.

    Raises:
        HeadwiseError: naming it.
    """
    if (trained := shared(data.heldout, data.text)) is not None:
        raise HeadwiseError(
            f"data.heldout {data.heldout} is trained on too (data.text {trained}), so it would measure nothing.",
            "Keep some text aside: --heldout FILE.",
        )


def check_fit(
    recipe: Recipe,
    student: ModelFolder,
    teacher: ModelFolder | None,
    tokenizer: Any,
    record: Mapping[str, Any] | None,
) -> None:
    """Refuse a run that cannot end well.

    Args:
        tokenizer: the student's. record: its folder's headwise.json.

    Raises:
        HeadwiseError: the recipe does not fit the model, or the teacher not the student.
    """
    if recipe.init is not None:
        raise HeadwiseError("This recipe makes a model of its own.", "python -m headwise.recipes.worker runs it.")
    check_text(recipe.data)
    length, ours = recipe.data.length, student.text
    longest = getattr(ours, "max_position_embeddings", None) or length
    if length > longest:
        raise HeadwiseError(
            f"data.length is {length}, and the model has positions for {longest} tokens.",
            f"Pass --set data.length={longest}, or convert it with --context first.",
        )
    if teacher is None:
        if recipe.needs_teacher:
            raise HeadwiseError("This recipe needs the parent to learn from.", "Pass --teacher MODEL.")
        return
    theirs, source = teacher.text, teacher.checkpoint.source
    if ours.vocab_size != theirs.vocab_size:
        raise HeadwiseError(
            f"The model predicts {ours.vocab_size:,} tokens and its teacher {source} {theirs.vocab_size:,}.",
            _WRONG_PARENT,
        )
    if load_tokenizer(teacher.checkpoint.folder, source).get_vocab() != tokenizer.get_vocab():
        raise HeadwiseError(f"The model and its teacher {source} have different tokenizers.", _WRONG_PARENT)
    inside = recipe.layerwise or recipe.loss.hidden_states or recipe.loss.attention_outputs
    for field in ("num_hidden_layers", "hidden_size"):
        a, b = getattr(ours, field), getattr(theirs, field)
        if inside and a != b:
            raise HeadwiseError(
                f"This recipe compares layers, and {field} is {a} here and {b} in the teacher {source}.",
                "Use the recipe distill, which compares what the models say.",
            )
    longest = getattr(theirs, "max_position_embeddings", None) or length
    if recipe.needs_teacher and length > longest:
        raise HeadwiseError(
            f"data.length is {length}, and the teacher {source} has positions for {longest} tokens.",
            f"Pass --set data.length={longest}.",
        )
    if recipe.layerwise:
        check_layerwise(student, teacher, record)
