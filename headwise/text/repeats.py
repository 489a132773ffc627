"""Join rows of text to longer ones, and repeat earlier passages in a share of them.

Text that a small model samples hardly ever repeats something from far above, so a student that learns from it loses
the heads that find a passage again (induction heads: Olsson et al. 2022, arXiv 2209.11895). Where a passage is
repeated, the parent predicts it from its first tokens on, and the student learns the same over any distance.
"""

from __future__ import annotations

import random

from torch import Tensor

# A changed row alternates at random between new text and repeated passages, of so many tokens each.
PASSAGE = (16, 128)
REPEATED = 0.5
# The start of a row is new text: this share of it.
NEW = 1 / 8


def join_rows(rows: Tensor, length: int) -> Tensor:
    """Join consecutive rows to rows of another length; rows that fill none are left out.

    Args:
        rows: int64 (rows, tokens).
        length: of the result's rows, a multiple of `tokens`.

    Returns:
        int64 (rows * tokens // length, length).

    Raises:
        ValueError: `length` is no multiple of the length of a row.
    """
    factor, rest = divmod(length, rows.shape[1])
    if rest or not factor:
        raise ValueError(f"Rows of {rows.shape[1]} tokens do not join to rows of {length}.")
    return rows[: len(rows) // factor * factor].reshape(-1, length)


def repeat_passages(rows: Tensor, share: float, seed: int) -> Tensor:
    """Replace passages of some rows by copies of earlier passages of the same row.

    Args:
        rows: int64 (rows, tokens).
        share: of the rows that are changed, 0 to 1.
        seed: decides which rows, and which passages.

    Returns:
        A tensor of the same shape; rows that are not changed are equal.
    """
    chance = random.Random(seed)
    result = rows.clone()
    length = rows.shape[1]
    for index in sorted(chance.sample(range(len(rows)), round(share * len(rows)))):
        row = result[index]
        place = max(1, int(NEW * length))
        while place < length:
            size = min(chance.randint(*PASSAGE), length - place)
            if chance.random() < REPEATED:
                size = min(size, place)
                start = chance.randint(0, place - size)
                row[place : place + size] = row[start : start + size].clone()
            place += size
    return result
