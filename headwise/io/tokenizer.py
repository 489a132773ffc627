"""A checkpoint's tokenizer, loaded in one place: its files are a stranger's, and its library raises anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError


def load_tokenizer(
    folder: str | Path, source: str | Path, hint: str = "Add the tokenizer's files to the folder."
) -> Any:
    """The tokenizer in a folder.

    Args:
        source: what the user calls that folder.
        hint: what to do where there is none.

    Raises:
        HeadwiseError: transformers cannot load one from it.
    """
    from transformers import AutoTokenizer

    with sound(f"{source} has no tokenizer that transformers can load", hint):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def sound(complaint: str, hint: str) -> Iterator[None]:
    """Say in a sentence that a tokenizer is not sound. Its library raises anything then, panics included."""
    try:
        yield
    except (HeadwiseError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise HeadwiseError(f"{complaint}: {reason}.", hint) from error
