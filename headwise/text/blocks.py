"""Text to rows of tokens: for calibration, training and measurement, deterministic by seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.recipes.settings import Data
from headwise.text import sources
from headwise.text.builtin import HELDOUT, SPLITS
from headwise.text.packing import beginning_of_text, encode, pack
from headwise.text.sources import documents
from headwise.text.stream import Stream

__all__ = ["HELDOUT", "SPLITS", "blocks_from", "builtin_blocks", "documents", "training_blocks"]


def builtin_blocks(
    tokenizer: Any, split: str = "calibration", length: int = 1024, count: int | None = None, seed: int = 0
) -> Tensor:
    """Blocks of the builtin text, int64 (count, length); see `blocks_from`."""
    return blocks_from("builtin", tokenizer, split=split, length=length, count=count, seed=seed)


def blocks_from(
    source: str,
    tokenizer: Any,
    *,
    split: str = "calibration",
    length: int = 1024,
    count: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Tokens of a text source, packed into blocks.

    Documents follow one another with the tokenizer's end-of-text token between them, and are cut wherever a
    block is full. Where the tokenizer begins a text with a BOS token, so does every document and every block.

    Args:
        source: see `sources`.
        split: of `builtin`: `train` and `calibration` (library source and its prose, in different orders),
            `heldout` (the modules in HELDOUT), `prose` (language reference and docstrings).
        count: how many blocks, drawn over the whole source by `seed`. None: all there are, in order.

    Returns:
        int64 (count, length).

    Raises:
        HeadwiseError: unknown source or split, unreadable file, less text than asked for.
    """
    wanted = None if count is None else count * length
    texts = documents(source, split, characters=None if wanted is None else 16 * wanted)
    if wanted is not None:
        # One long file would fill many blocks: draw pieces instead, so that few blocks still see much variety.
        texts = [piece for text in texts for piece in _pieces(text, 16 * length)]
        random.Random(f"{split} {seed}").shuffle(texts)
    encoded = _until(encode(texts, tokenizer, batch=1024 if wanted is None else 16), wanted)
    blocks = pack(encoded, length, begin=beginning_of_text(tokenizer))[:count]
    if len(blocks) < (count or 1):
        raise HeadwiseError(
            f"{source} holds {len(blocks)} blocks of {length} tokens, {count or 1} were asked for.",
            "Ask for fewer or shorter blocks, or give more text.",
        )
    return blocks.long()


def training_blocks(
    data: Data, tokenizer: Any, tokens: int, seed: int = 0
) -> tuple[Any, Mapping[str, Mapping[str, int]]]:
    """Whole documents in random order, packed: one pass over a recipe's text, or as much as holds `tokens`.

    Returns:
        int32 (blocks, length), and for each source the documents and characters in it and its times per pass.
        Where one of the sources is too long to be read at once, a `Stream` of the same rows, and the times only.

    Raises:
        HeadwiseError: unknown source, unreadable file, not one block of text.
    """
    if any(map(sources.is_streamed, data.text)):
        return Stream(data.text, tokenizer, data.length, seed), {
            source: {"times": times} for source, times in data.text.items()
        }
    texts: list[str] = []
    read = {}
    for source, times in data.text.items():
        found = documents(source, "train")
        read[source] = {"documents": len(found), "characters": sum(map(len, found)), "times": times}
        texts += found * times
    random.Random(f"train {seed}").shuffle(texts)
    blocks = pack(_until(encode(texts, tokenizer), tokens), data.length, begin=beginning_of_text(tokenizer))
    if not len(blocks):
        named = ", ".join(data.text) or "none given"
        raise HeadwiseError(f"The recipe's text ({named}) does not fill one block of {data.length} tokens.")
    return blocks, read


def _until(encoded: Iterable[np.ndarray], tokens: int | None) -> Iterator[np.ndarray]:
    """As many documents as hold that many tokens (None: all)."""
    for document in encoded:
        yield document
        if tokens is not None:
            tokens -= len(document)
            if tokens <= 0:
                return


def _pieces(text: str, characters: int) -> list[str]:
    """A text cut at line ends into pieces of about that many characters."""
    pieces, start = [], 0
    while len(text) - start > characters:
        end = text.find("\n", start + characters) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text[start:] else pieces
