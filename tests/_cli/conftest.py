"""Tests of the command line print to the streams of their own test, as to a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headwise._cli import console


@pytest.fixture(autouse=True)
def fresh_console(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the streams of a test after it: pytest closes them. Tests that name no width print as to a file.

    pytest loads readline, which sets COLUMNS for the processes of pytest-xdist.
    """
    monkeypatch.delenv("COLUMNS", raising=False)
    yield
    console._sink = console._Sink()
