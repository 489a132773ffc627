"""Make blocks of tokens from text, for calibration, training and measurement; a seed decides the order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.text import sources
from headwise.text.builtin import HELDOUT, SPLITS
from headwise.text.chat import Chat
from headwise.text.marks import tokens_of
from headwise.text.packing import beginning_of_text, encode, pack
from headwise.text.sources import Data, documents
from headwise.text.stream import Stream

__all__ = ["HELDOUT", "SPLITS", "blocks_from", "builtin_blocks", "documents", "training_blocks"]


def builtin_blocks(
    tokenizer: Any, split: str = "calibration", length: int = 1024, count: int | None = None, seed: int = 0
) -> Tensor:
    """Return blocks of the builtin text, int64 (count, length).

    Args:
        tokenizer: a stock tokenizer.
        split: see `blocks_from`.
        length: tokens of a block.
        count: number of blocks; None: all, in order.
        seed: of the choice of blocks.
    """
    return blocks_from("builtin", tokenizer, split=split, length=length, count=count, seed=seed)


def blocks_from(
    source: str,
    tokenizer: Any,
    *,
    split: str = "calibration",
    length: int = 1024,
    count: int | None = None,
    seed: int = 0,
    minimum: int | None = None,
    marked: bool = False,
) -> Tensor:
    """Return the tokens of a text source, packed into blocks.

    Documents follow one another with the tokenizer's end-of-text token between them, and are cut wherever a
    block is full. Where the tokenizer begins a text with a BOS token, so does every document and every block.

    Args:
        source: see `headwise.text.sources`.
        tokenizer: a stock tokenizer.
        split: of `builtin`: `train` and `calibration` (library source and its prose, in different orders),
            `heldout` (the modules in HELDOUT), `prose` (language reference and docstrings).
        length: tokens of a block.
        count: number of blocks, drawn from the whole source by `seed`; None: all, in order.
        seed: of the choice of blocks.
        minimum: number of blocks that is enough where the source has no more; None: `count`.
        marked: keep the marks of `headwise.text.marks`, by which a loss counts the answers of a conversation only.

    Returns:
        int64 (count, length).

    Raises:
        HeadwiseError: the source or split is unknown, a file cannot be read, or the text is too short.
    """
    num_tokens = None if count is None else count * length
    texts = documents(source, split, characters=None if num_tokens is None else 16 * num_tokens)
    if num_tokens is not None:
        # One long file would fill many blocks. Pieces of files give few blocks more variety.
        texts = [piece for text in texts for piece in _pieces(text, 16 * length)]
        random.Random(f"{split} {seed}").shuffle(texts)
    encoded = _up_to(encode(texts, tokenizer, batch=1024 if num_tokens is None else 16), num_tokens)
    blocks = pack(encoded, length, begin=beginning_of_text(tokenizer))[:count]
    if len(blocks) < (minimum or count or 1):
        raise HeadwiseError(
            f"{source} holds {len(blocks)} blocks of {length} tokens, and {minimum or count or 1} are needed.",
            "Ask for fewer or shorter blocks, or give more text.",
        )
    return (blocks if marked else tokens_of(blocks)).long()


def training_blocks(
    data: Data, tokenizer: Any, tokens: int, seed: int = 0
) -> tuple[Any, Mapping[str, Mapping[str, int]]]:
    """Return whole documents in random order, packed: one pass over a recipe's text, or as much as holds `tokens`.

    Args:
        data: the text of a recipe.
        tokenizer: a stock tokenizer.
        tokens: number of tokens that are enough.
        seed: of the order.

    Returns:
        int32 (blocks, length) with the marks of `headwise.text.marks`, and for each source the documents and
        characters in it and its times per pass.
        Where a source is too long to be read at once, a `Stream` of rows instead, and the times only.

    Raises:
        HeadwiseError: a source is unknown, a file cannot be read, or the text does not fill one block.
    """
    if any(map(sources.is_streamed, data.text)):
        return Stream(data.text, tokenizer, data.length, seed), {
            source: {"times": times} for source, times in data.text.items()
        }
    texts: list[str | Chat] = []
    facts = {}
    for source, times in data.text.items():
        read = documents(source, "train")
        facts[source] = {"documents": len(read), "characters": sum(map(len, read)), "times": times}
        texts += read * times
    random.Random(f"train {seed}").shuffle(texts)
    blocks = pack(_up_to(encode(texts, tokenizer), tokens), data.length, begin=beginning_of_text(tokenizer))
    if not len(blocks):
        named = ", ".join(data.text) or "none given"
        raise HeadwiseError(f"The recipe's text ({named}) does not fill one block of {data.length} tokens.")
    return blocks, facts


def _up_to(encoded: Iterable[np.ndarray], tokens: int | None) -> Iterator[np.ndarray]:
    """Yield documents until they hold that many tokens (None: all)."""
    for document in encoded:
        yield document
        if tokens is not None:
            tokens -= len(document)
            if tokens <= 0:
                return


def _pieces(text: str | Chat, characters: int) -> list[str | Chat]:
    """Return a text cut at line ends into pieces of about that many characters; a conversation stays whole."""
    if isinstance(text, Chat):
        return [text]
    pieces: list[str | Chat] = []
    start = 0
    while len(text) - start > characters:
        end = text.find("\n", start + characters) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:] else pieces
