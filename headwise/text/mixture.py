"""Provide the built-in mixture: English prose and dialogue that the package ships, and code of the running Python.

`english.jsonl.xz` is made by `benchmarks/english_text.py`; `LICENSES.md` names the licence of each source.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from headwise.text.builtin import library_documents

ENGLISH = Path(__file__).with_name("english.jsonl.xz")
# Share of the characters that is code, and the characters of a piece of it.
CODE_SHARE, PIECE = 0.3, 4000
# One document in this many is held out.
HELDOUT_EVERY = 10


def mixture_documents(split: str) -> list[str]:
    """Return the texts of a split of the mixture, in a fixed order.

    Args:
        split: of `headwise.text.builtin.SPLITS`: `heldout`, which no other split shares text with; `prose`, English
            alone; any other, English and code.

    Raises:
        HeadwiseError: there is no such split, or this Python has no readable library.
    """
    rows = [json.loads(line)["text"] for line in lzma.decompress(ENGLISH.read_bytes()).splitlines()]
    held = rows[::HELDOUT_EVERY]
    english = held if split == "heldout" else [text for text in rows if text not in set(held)]
    if split == "prose":
        return english
    characters = sum(map(len, english)) * CODE_SHARE / (1 - CODE_SHARE)
    return english + _evenly("\n".join(library_documents(split)), int(characters))


def _evenly(code: str, characters: int) -> list[str]:
    """Return pieces spread evenly over a text, each from a line's beginning to a line's end."""
    count = max(1, characters // PIECE)
    starts = [code.find("\n", i * len(code) // count) + 1 for i in range(count)]
    return [code[start : code.find("\n", start + PIECE) + 1 or len(code)] for start in starts]
