"""Check that a recipe, a model and its teacher match, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headwise.errors import HeadwiseError, SettingError
from headwise.io.tokenizer import load_tokenizer
from headwise.models.stock_match import require_head
from headwise.models.table import require_decoder
from headwise.recipes.layerwise import check_layerwise
from headwise.recipes.settings import UptrainRecipe
from headwise.text.pairs import require_pairs
from headwise.text.sources import SELF, Data, overlapping
from headwise.train.student import ModelFolder

_WRONG_PARENT = "Name the model that the folder was converted from."


def check_text(data: Data) -> None:
    """Refuse missing files, and a text that is both trained on and held out.

    Args:
        data: the text of a recipe.

    Raises:
        HeadwiseError: a file is missing.
        SettingError: the held-out text is trained on too.
    """
    if (trained := overlapping(data.heldout, data.text)) is not None:
        raise SettingError(
            "data.heldout",
            f"data.heldout {data.heldout} is trained on too (data.text {trained}).",
            "Hold some text out: give `heldout` another file.",
        )


def check_pair_recipe(recipe: UptrainRecipe) -> None:
    """Refuse what the training of an encoder-decoder cannot do, and text without pairs.

    Args:
        recipe: what is trained, and how.

    Raises:
        HeadwiseError: a line of a file is no pair.
        SettingError: a source holds no pairs, or the recipe has a part for decoder-only models.
    """
    for source in recipe.data.text:
        require_pairs(source, "text")
    require_pairs(recipe.data.heldout, "heldout")
    parts = {"layerwise": recipe.layerwise is not None, "teacher.topk": recipe.teacher.topk is not None}
    for name in (name for name, given in parts.items() if given):
        raise SettingError(
            name,
            f"The recipe has {name}, which reads text of one side, and an encoder-decoder reads pairs.",
            "Use the recipe distill.",
        )


def check_compatible(
    recipe: UptrainRecipe,
    student: ModelFolder,
    teacher: ModelFolder | None,
    tokenizer: Any,
    record: Mapping[str, Any] | None,
) -> None:
    """Refuse a recipe that does not match the model, and a teacher that does not match the student.

    Args:
        recipe: what is trained, and how.
        student: the folder that is trained.
        teacher: the parent, if there is one.
        tokenizer: the student's.
        record: the headwise.json of the student's folder.

    Raises:
        HeadwiseError: they do not match; the message names what differs.
    """
    check_text(recipe.data)
    if student.stock.reads_pairs:
        check_pair_recipe(recipe)
    if any(layout.indexer for layout in student.layouts):
        raise HeadwiseError(
            f"{student.checkpoint.source} has indexers, and training would change the attention that they were "
            "made for.",
            "Train the MLA folder without indexers, and convert the trained one with `sparse`.",
        )
    for folder in (student, teacher):
        if folder is not None and not folder.is_latent:
            if not student.stock.reads_pairs:
                require_decoder(folder.checkpoint.source, folder.checkpoint.config, "trained")
            require_head(folder.checkpoint, "the training compares its logits")
    length, config = recipe.data.length, student.text
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise SettingError(
            "data.length",
            f"data.length is {length}, and the model has positions for {longest} tokens.",
            f"Give data.length={longest}, or convert the model to a longer context first.",
        )
    if teacher is None:
        if SELF in recipe.data.text:
            raise SettingError("teacher", "The text self is sampled from the parent.", "Give `teacher`.")
        if recipe.needs_teacher:
            named = (record or {}).get("source")
            name = named.get("model") if isinstance(named, dict) else None
            missing = f", and {name}, which headwise.json names, is not where it was" if name else ""
            raise SettingError("teacher", f"This recipe needs the parent as a teacher{missing}.", "Give `teacher`.")
        return
    teacher_config, source = teacher.text, teacher.checkpoint.source
    if teacher.stock.reads_pairs != student.stock.reads_pairs:
        raise HeadwiseError(
            f"Of the model and its teacher {source}, only one is an encoder-decoder.", _WRONG_PARENT
        )
    if config.vocab_size != teacher_config.vocab_size:
        raise HeadwiseError(
            f"The model has a vocabulary of {config.vocab_size:,} tokens and its teacher {source} one of "
            f"{teacher_config.vocab_size:,}.",
            _WRONG_PARENT,
        )
    if load_tokenizer(teacher.checkpoint.folder, source).get_vocab() != tokenizer.get_vocab():
        raise HeadwiseError(f"The model and its teacher {source} have different tokenizers.", _WRONG_PARENT)
    compares_layers = recipe.layerwise or recipe.loss.needs_activations
    for field in ("num_hidden_layers", "hidden_size"):
        a, b = getattr(config, field), getattr(teacher_config, field)
        if compares_layers and a != b:
            raise HeadwiseError(
                f"This recipe compares layers, and {field} is {a} here and {b} in the teacher {source}.",
                "Use the recipe distill, which compares logits.",
            )
    longest = getattr(teacher_config, "max_position_embeddings", None) or length
    if recipe.needs_teacher and length > longest:
        raise SettingError(
            "data.length",
            f"data.length is {length}, and the teacher {source} has positions for {longest} tokens.",
            f"Give data.length={longest}.",
        )
    if recipe.layerwise:
        check_layerwise(student, teacher, record)
