"""Load a checkpoint's tokenizer, and report every failure of its library as a HeadwiseError."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError, is_out_of_memory
from headwise.io.fs import REASONS, DiskError
from headwise.io.source import read_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that hold the vocabulary of a tokenizer.
VOCABULARIES = (TOKENIZER, "*.model", "*.tiktoken", "vocab.*", "tekken.json")
# BPE vocabularies that were run in llama.cpp's converter, by number of tokens and the SHA-256 of `_known_name`.
KNOWN = {
    (49_152, "83f3d7c09d5a5d5f090cea160b1deb3fafdf3d23feb22d50b24c12851e9a64fa"): "SmolLM2",
    (2_048, "f611490ff65d64390a85415649200a6380f5b14815d150ea6c29f13afefa8a0e"): "the embedded model",
}


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

    complaint = f"{source} has no tokenizer that transformers can load"
    with tokenizer_errors(complaint, hint):
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            # The library then lists what it tried. A few tokenizers, such as those of bytes, need no file.
            if any(path for kind in VOCABULARIES for path in Path(folder).glob(kind)):
                raise
            raise HeadwiseError(f"{complaint}: there is no {TOKENIZER}.", hint) from error


def tokenizer_kind(folder: Path) -> str:
    """Return the kind of a folder's vocabulary, from its files alone.

    Args:
        folder: with the files of a tokenizer.

    Returns:
        "bpe" (byte-level BPE; "bpe of SmolLM2" and the like for a vocabulary of `KNOWN`), "sentencepiece" (also BPE
        with byte fallback), "other", "none" or "unreadable".
    """
    if not (folder / TOKENIZER).is_file():
        return "sentencepiece" if (folder / "tokenizer.model").is_file() else "none"
    try:
        fields = read_json(folder, TOKENIZER)
    except HeadwiseError:  # the file is only described here; whoever loads it reports the error
        return "unreadable"
    model = fields.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return "other"
    if model.get("byte_fallback"):
        return "sentencepiece"
    if "ByteLevel" not in json.dumps([fields.get("pre_tokenizer"), fields.get("decoder")]):
        return "other"
    name = _known_name(fields, model)
    return f"bpe of {name}" if name else "bpe"


def _known_name(fields: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Return the name of a vocabulary of `KNOWN`, by what decides how it splits a text; None for another one."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return None
    if len(vocab) not in {tokens for tokens, _ in KNOWN}:
        return None
    pairs = [
        merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges
    ]  # in either spelling
    text = json.dumps([fields.get("normalizer"), fields.get("pre_tokenizer"), vocab, pairs], sort_keys=True)
    return KNOWN.get((len(vocab), hashlib.sha256(text.encode()).hexdigest()))


def raised_max_length(folder: Path, length: int) -> tuple[int, str] | None:
    """Return a folder's tokenizer_config.json with `model_max_length` raised to a longer context.

    Tokenizers truncate at that length, and engines take the smaller of it and the model's context.

    Args:
        folder: with the file.
        length: the context, in tokens.

    Returns:
        The present `model_max_length` and the new text of the file; None if no change is needed.

    Raises:
        HeadwiseError: the file is not a JSON object.
    """
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    fields = read_json(folder, TOKENIZER_CONFIG)
    present = fields.get("model_max_length")
    if isinstance(present, bool) or not isinstance(present, int) or present >= length:
        return None
    return present, json.dumps(fields | {"model_max_length": length}, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def tokenizer_errors(complaint: str, hint: str) -> Iterator[None]:
    """Turn any failure of the tokenizer library, panics of its Rust code included, into a sentence.

    Args:
        complaint: what failed, without a full stop; the reason is added behind a colon.
        hint: what to do.

    Raises:
        DiskError: in place of the operating system's error.
        HeadwiseError: in place of the library's error.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, HeadwiseError) or is_out_of_memory(error):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.errno in REASONS:
            why, advice = REASONS[error.errno]
            raise DiskError(f"{complaint}: {why}.", advice) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise HeadwiseError(f"{complaint}: {reason}.", hint) from error
