"""Marks on the tokens of a packed row: high bits of an integer that no vocabulary uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings import this module, and `--help` must not import torch
    from torch import Tensor

# A document begins inside the row. A document that begins with the row has no mark.
BEGINS = 1 << 30
# The token is context only: it is not predicted. Questions of a conversation have this mark.
GIVEN = 1 << 29
_TOKEN = GIVEN - 1


def tokens_of(rows: Tensor) -> Tensor:
    """Return rows without marks.

    Args:
        rows: integers of any shape.
    """
    return rows & _TOKEN


def begins(rows: Tensor) -> Tensor:
    """Return where a document begins, of the shape of the rows.

    Args:
        rows: integers, (rows, length).
    """
    first = (rows & BEGINS) != 0
    first[:, 0] = True
    return first


def given_tokens(rows: Tensor) -> Tensor:
    """Return which tokens are context only, of the shape of the rows.

    Args:
        rows: integers of any shape.
    """
    return (rows & GIVEN) != 0
