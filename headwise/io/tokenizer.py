"""Load a checkpoint's tokenizer, and report every failure of its library as a HeadwiseError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError


def load_tokenizer(
    folder: str | Path, source: str | Path, hint: str = "Add the tokenizer's files to the folder."
) -> Any:
    """Load the tokenizer of a folder.

    Args:
        folder: the folder.
        source: the user's name of that folder, for the message.
        hint: what to do where it has no tokenizer.

    Returns:
        A tokenizer of transformers.

    Raises:
        HeadwiseError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with tokenizer_errors(f"{source} has no tokenizer that transformers can load", hint):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def tokenizer_errors(complaint: str, hint: str) -> Iterator[None]:
    """Turn any failure of the tokenizer library, panics of its Rust code included, into a sentence.

    Args:
        complaint: what failed, without a full stop; the reason is added behind a colon.
        hint: what to do.

    Raises:
        HeadwiseError: in place of the library's error.
    """
    try:
        yield
    except (HeadwiseError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise HeadwiseError(f"{complaint}: {reason}.", hint) from error
