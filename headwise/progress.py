"""How library code tells of its work. The library itself prints nothing; whoever called it decides."""

from __future__ import annotations


class Progress:
    """A silent listener. `ui.py` has the one that draws; a test may keep what it hears.

    A job runs through stages one after another; `stage` ends the one before it and `finish` the last. Advance
    by whatever the stage counts in (layers, bytes, tokens, steps).
    """

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Begin a stage: what is done, how much of it there is (None: unknown), and in which unit."""

    def advance(self, amount: int = 1, **fields: object) -> None:
        """`amount` more is done; `fields` are figures worth showing beside it, such as layer=3."""

    def note(self, text: str) -> None:
        """One line that whoever watches should read."""

    def warn(self, text: str) -> None:
        """One line that whoever watches must not miss."""

    def finish(self) -> None:
        """The last stage is over."""


SILENT = Progress()
