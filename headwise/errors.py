"""The one exception a user is meant to see."""

from __future__ import annotations


class HeadwiseError(Exception):
    """A mistake the user can mend: what is wrong, and what to type or change instead.

    Args:
        message: one sentence that names the file, the field and the value.
        hint: what to do about it, a command where there is one.
    """

    exit_code = 2
    # Whether the unfinished work of a long job stays, because what is wrong lies outside of it.
    keeps_work = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class GateFailed(HeadwiseError):
    """The work ran to its end and a check on its result failed (exit code 1)."""

    exit_code = 1


class SettingError(HeadwiseError):
    """A field of a settings object has a value that is not legal, or contradicts another field.

    The library names the field; the command line adds the flag.

    Args:
        field: the Python name of the field, such as "rope_dim".
        message: one sentence that names the field and its value.
        hint: what to do about it.
    """

    def __init__(self, field: str, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.field = field
