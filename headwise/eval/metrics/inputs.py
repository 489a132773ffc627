"""Build the inputs that every model of an evaluation gets: text, prompts, and the arguments of generated tasks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headwise.errors import SettingError
from headwise.eval.metrics import generation
from headwise.eval.model import EvalModel
from headwise.eval.settings import EvalRecipe
from headwise.measure.image_prompts import ImagePrompts, open_prompts
from headwise.measure.positions import overlapping_windows
from headwise.progress import Progress
from headwise.text.blocks import blocks_from
from headwise.text.pairs import PairMarks, Pairs, encode_pairs, require_pairs

RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
UNLIMITED = 1 << 20


@dataclass(frozen=True)
class EvalInputs:
    """Token ids that every model gets.

    Attributes:
        blocks: text of the perplexity, (blocks, length); None: not measured.
        pairs: pairs whose targets are predicted, for an encoder-decoder; None: not measured.
        images: prompts with images whose text is predicted, for a vision-language model; None: not measured.
        windows: text of the loss by position, (windows, length); None: measured on `blocks`.
        prompts: beginnings to continue, (prompts, length); None: not measured.
        width: positions in an interval of the loss by position; 0: not measured.
        new_tokens: tokens to write after each prompt.
    """

    blocks: Tensor | None = None
    windows: Tensor | None = None
    prompts: Tensor | None = None
    width: int = 0
    new_tokens: int = 0
    pairs: Pairs | None = None
    images: ImagePrompts | None = None

    @property
    def has_text(self) -> bool:
        """Return whether a loss is measured."""
        return any(text is not None for text in (self.blocks, self.windows, self.pairs, self.images))

    def content_hash(self) -> str:
        """Compute the SHA-256 of all inputs."""
        total = hashlib.sha256(f"{self.width} {self.new_tokens}".encode())
        pairs = () if self.pairs is None else vars(self.pairs).values()
        for part in (self.blocks, self.windows, self.prompts, *pairs):
            total.update(b"" if part is None else f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
        if self.images is not None:
            total.update(b"text alone" + self.images.content_hash().encode())
        return total.hexdigest()


def make_inputs(recipe: EvalRecipe, tokenizer: Any, context: int | None, seed: int) -> EvalInputs:
    """Build the inputs of everything but the tasks.

    Args:
        recipe: what is measured.
        tokenizer: of child and parent.
        context: `max_position_embeddings` of the child; None if it is unknown.
        seed: random seed of the choice of text.
    """
    blocks = windows = prompts = None
    width = 0
    if (text := recipe.perplexity) is not None:
        length = min(text.length, context or text.length)
        blocks = blocks_from(text.text, tokenizer, split=text.split, length=length, count=text.blocks, seed=seed)
        width = length // text.stretches if length % text.stretches == 0 else 0
    if (positions := recipe.positions) is not None and context is not None:
        width = max(1, context // positions.stretches)
        length = width * positions.stretches
        count = -(-positions.windows // positions.stretches) + 1
        stream = blocks_from(
            positions.text, tokenizer, split=positions.split, length=length, count=count, seed=seed
        )
        windows = overlapping_windows(stream, length, width)[: positions.windows]
    if (writing := recipe.generation) is not None:
        length = min(writing.prompt_tokens, (context or UNLIMITED) // 2)
        prompts = generation.select_prompts(tokenizer, writing.prompts, length, seed)
    return EvalInputs(blocks, windows, prompts, width, writing.new_tokens if writing else 0)


def make_pair_inputs(path: Path, tokenizer: Any, model: EvalModel, progress: Progress) -> EvalInputs:
    """Build the inputs of an encoder-decoder: the pairs of a file.

    Args:
        path: the file.
        tokenizer: of child and parent.
        model: the child.
        progress: receives a note if pairs are longer than the model's context.

    Raises:
        HeadwiseError: the file holds fewer than two pairs, or a token is outside the vocabulary.
    """
    given = require_pairs(path, "pairs")
    if len(given) < 2:
        raise SettingError("pairs", f"{path} holds {len(given)} pair, and two are needed.", "Give more pairs.")
    decoder = model.text_config
    context = model.context or UNLIMITED
    whole = encode_pairs(given, tokenizer, PairMarks.of(model.source.config, decoder), context + 1)
    masks = (whole.source_mask, whole.target_mask)
    long = sum(mask[:, context] for mask in masks if mask.shape[1] > context)
    if cut := int((long > 0).sum()) if isinstance(long, Tensor) else 0:
        progress.warn(
            f"{cut:,} of {len(given):,} pairs exceed the context of {context:,} tokens and were truncated."
        )
    return EvalInputs(pairs=Pairs(*(rows[:, :context] for rows in vars(whole).values())))


def make_image_inputs(path: Path, model: EvalModel) -> EvalInputs:
    """Build the inputs of a vision-language model: the image-text pairs of a file, by the processor of the child.

    Args:
        path: the file.
        model: the child.

    Raises:
        SettingError: the model reads no images, or the file holds fewer than two pairs.
        HeadwiseError: a line is no pair, an image cannot be read, a prompt exceeds the context, or the folder has
            no processor.
    """
    source = model.source
    prompts = open_prompts(path, model.auto_class, source.folder, source.name, source.config)
    for _ in prompts:  # each is checked as it is made, before the report's folder is
        pass
    return EvalInputs(images=prompts)


def task_arguments(
    recipe: EvalRecipe, context: int | None, seed: int, task_data: Path | None = None
) -> dict[str, Any]:
    """Build the arguments of the tasks that generate their own questions: passkey, cloze and RULER.

    Args:
        recipe: what is measured.
        context: `max_position_embeddings` of the child; None if it is unknown.
        seed: random seed of the questions.
        task_data: folder with the questions of benchmarks; None: the Hub.
    """
    arguments: dict[str, Any] = {"seed": seed}
    if task_data is not None:
        arguments["task_data"] = str(task_data)
    if recipe.passkey is not None:
        arguments |= {"depths": list(recipe.passkey.depths), "samples": recipe.passkey.samples}
        arguments |= {"lengths": [int(share * (context or 0)) for share in recipe.passkey.lengths]}
        arguments |= {"max_seq_lengths": [length for length in RULER_LENGTHS if length <= (context or 0)]}
    return arguments
