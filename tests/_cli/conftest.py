"""Tests of the command line print to the streams of their own test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headwise._cli import console


@pytest.fixture(autouse=True)
def fresh_console() -> Iterator[None]:
    """Forget the streams of a test after it: pytest closes them."""
    yield
    console._sink = console._Sink()
