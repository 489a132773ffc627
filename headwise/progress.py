"""Report progress from library code, which itself prints nothing."""

from __future__ import annotations


class Progress:
    """Receive the progress of a job and ignore it; subclasses draw or record it.

    A job runs through stages one after another: `stage` ends the stage before it, `finish` ends the last one.
    Each stage counts in one unit (layers, bytes, tokens, steps).
    """

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Begin a stage.

        Args:
            name: what is done.
            total: how much of it there is; None: unknown.
            unit: what is counted.
        """

    def expect(self, seconds: float, done: int = 0) -> None:
        """Give what is known of the present stage before its work begins.

        Args:
            seconds: forecast of the time that is left.
            done: what an interrupted run has done of the total.
        """

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Count work that is done.

        Args:
            amount: how much more is done, in the unit of the stage.
            **fields: values to show beside the count, such as `layer=3`.
        """

    def note(self, text: str) -> None:
        """Report a line of information.

        Args:
            text: one line.
        """

    def warn(self, text: str) -> None:
        """Report a line that the user must not miss.

        Args:
            text: one line.
        """

    def finish(self) -> None:
        """End the last stage."""


SILENT = Progress()
