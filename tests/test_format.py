"""Sizes, durations, names and plain JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.format import duration, parse_bytes, public_command, public_data, public_text, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (4096, "4.1 kB"), (13.5e9, "13.5 GB"), (2.5e15, "2500 TB")],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(1.25, "1.2 s"), (59, "59 s"), (75, "1:15"), (3700, "1:01:40")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
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
def test_sizes_are_parsed(text: int | str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "5iB", "5G", "-1GB", "0", "0GB", "five", "1e3GB"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/home/ann/my models/x", "x"),
        ("--text=/home/ann/x.jsonl", "--text=x.jsonl"),
        ("data.text=[/home/ann/x, /home/ann/*.txt]", "data.text=[x, *.txt]"),
        ("piqa,/home/ann/own.yaml", "piqa,own.yaml"),
        ("out/mqa", "out/mqa"),
        ("../x", "../x"),
        ("org/name@main", "org/name@main"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("one and/or the other", "one and/or the other"),
        ("1 / 2", "1 / 2"),
        ("/", "/"),
        ("/a/b\n/c/d", "/a/b\n/c/d"),
    ],
)
def test_folders_of_absolute_paths_are_not_published(text: str, published: str) -> None:
    assert public_text(text) == published
    assert public_data({text: [text, 1, None]}) == {published: [published, 1, None]}


def test_a_path_is_published_as_a_name() -> None:
    assert public_data((Path("/home/ann/x"), Path("y/z"))) == ["x", "y/z"]


def test_files_of_one_name_stay_apart() -> None:
    assert public_data({"/a/x.txt": 1, "/b/x.txt": 2, "y": 3}) == {"x.txt": 1, "x.txt (2)": 2, "y": 3}


def test_a_command_is_quoted_after_its_folders_are_cut() -> None:
    words = ["headwise", "eval", "/home/ann/a b", "--report", "/r/x y/z"]
    assert public_command(words) == "headwise eval 'a b' --report z"
