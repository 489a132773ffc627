"""A conversion as text for a reader."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headwise._cli.render.conversion import quality_statement


@pytest.mark.parametrize(
    ("parent", "commands"),
    [
        ("org/name", "headwise eval OUT --baseline org/name"),
        ("my model", "headwise eval OUT --baseline 'my model'"),
        ("a.gguf", "headwise eval OUT --baseline a.gguf"),
    ],
)
def test_a_conversion_ends_with_commands_that_evaluate_it(parent: str, commands: str) -> None:
    plan = SimpleNamespace(exact=False, model=parent)
    loss = SimpleNamespace(before=2.0, after=2.5, tokens=1024, source="mixture")
    for text_loss in (None, loss):
        result: Any = SimpleNamespace(plan=plan, out="OUT", text_loss=text_loss)
        assert quality_statement(result).endswith(f"easured: run {commands}")
