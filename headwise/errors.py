"""Exceptions for users: one sentence, a hint, and an exit code."""

from __future__ import annotations

import errno
from typing import Any


class HeadwiseError(Exception):
    """An error that the user can correct.

    Args:
        message: one sentence that names the file, the field and the value.
        hint: what to do, with the command where there is one.
    """

    exit_code = 2
    # Whether a long job keeps its unfinished work; True if the cause is outside of the input.
    keeps_work = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what another process makes an equal exception from."""
        return _restore, (type(self), self.args), self.__dict__


def _restore(kind: type[HeadwiseError], args: tuple[Any, ...]) -> HeadwiseError:
    return kind.__new__(kind, *args)


class GateFailed(HeadwiseError):
    """The work is complete, and a check of its result failed (exit code 1)."""

    exit_code = 1


class SettingError(HeadwiseError):
    """A field of a settings object has an illegal value, or contradicts another field.

    The library names the field; the command line adds the flag.

    Args:
        field: the Python name of the field, such as "rope_dim".
        message: one sentence that names the field and its value.
        hint: what to do.
    """

    def __init__(self, field: str, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.field = field


# What torch reports as a RuntimeError, and safetensors as text, where an allocation fails on the CPU or on a GPU.
_NO_MEMORY = (
    "out of memory",
    "cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory, of the machine or of a GPU, is used up.

    Args:
        error: the exception of any library.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, HeadwiseError):
        return False
    text = str(error).lower()
    named = type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError)
    return isinstance(error, MemoryError) or (named and any(words in text for words in _NO_MEMORY))
