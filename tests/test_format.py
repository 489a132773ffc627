"""Sizes, durations, names and plain JSON."""

from __future__ import annotations

import pytest

from headwise.format import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500mb", 5 * 10**8),
        ("1.5 GB", 15 * 10**8),
        ("24GiB", 24 * 2**30),
        ("512 KiB", 512 * 2**10),
        ("80tib", 80 * 2**40),
        ("12", 12),
        (7, 7),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5iB", "5G", "-1GB", "0", "0GB", "five", "1e3GB"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
