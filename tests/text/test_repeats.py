"""Longer rows, and passages that come again."""

from __future__ import annotations

import pytest
import torch

from headwise.text.repeats import NEW, join_rows, repeat_passages


def test_rows_join_in_their_order() -> None:
    rows = torch.arange(7 * 5).view(7, 5)
    joined = join_rows(rows, 15)
    assert joined.shape == (2, 15) and torch.equal(joined.flatten(), torch.arange(30))
    assert torch.equal(join_rows(rows, 5), rows)
    for length in (4, 12):
        with pytest.raises(ValueError, match=f"rows of {length}"):
            join_rows(rows, length)


@pytest.mark.parametrize("length", [1, 2, 37, 700])
def test_a_share_of_the_rows_repeats_earlier_passages(length: int) -> None:
    rows = torch.arange(10 * length).view(10, length)
    result = repeat_passages(rows, 0.3, seed=3)
    changed = [i for i in range(10) if not torch.equal(rows[i], result[i])]
    assert len(changed) <= 3 and torch.equal(rows, torch.arange(10 * length).view(10, length))
    if length == 700:
        assert len(changed) == 3
    for i in changed:
        before, after = rows[i].tolist(), result[i].tolist()
        start = max(1, int(NEW * length))
        assert after[:start] == before[:start]
        for place, token in enumerate(after):
            # A token is the row's own, or stands somewhere above: copies of copies too.
            assert token == before[place] or token in after[:place]


def test_a_copy_is_as_long_as_a_passage_and_the_seed_decides() -> None:
    rows = torch.arange(4096)[None]
    result = repeat_passages(rows, 1.0, seed=0)
    steps = result[0].diff()
    # Inside a passage, new or repeated, tokens follow one another: jumps are as rare as passages.
    assert 4096 / 128 / 2 < int((steps != 1).sum()) < 4096 / 16
    copied = result[0] != rows[0]
    assert 0.3 < copied.float().mean() < 0.7
    assert torch.equal(result, repeat_passages(rows, 1.0, seed=0))
    assert not torch.equal(result, repeat_passages(rows, 1.0, seed=1))
    assert torch.equal(repeat_passages(rows, 0.0, seed=0), rows)
