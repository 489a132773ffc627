"""Marks are read back, and leave the tokens as they were."""

from __future__ import annotations

import torch

from headwise.text.marks import BEGINS, GIVEN, begins, given_tokens, tokens_of


def test_marks_do_not_change_tokens() -> None:
    tokens = torch.tensor([[7, 0, 200_000], [5, 5, 1]], dtype=torch.int32)
    marked = tokens.clone()
    marked[0, 1] |= BEGINS
    marked[:, 2] |= GIVEN
    marked[0, 2] |= BEGINS
    assert torch.equal(tokens_of(marked), tokens)
    assert begins(marked).tolist() == [[True, True, True], [True, False, False]]
    assert given_tokens(marked).tolist() == [[False, False, True], [False, False, True]]
