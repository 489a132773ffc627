"""Tokenizer of a GGUF file -> the files of a fast tokenizer, which every release of transformers loads.

transformers builds one too (`AutoTokenizer.from_pretrained(folder, gguf_file=...)`), but not the same one in every
release: in 5.16 the EOS token of Llama is the BOS token, and Gemma's vocabulary becomes a unigram model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwise.errors import HeadwiseError
from headwise.io.gguf_config import load_gguf_table
from headwise.io.tokenizer import tokenizer_errors
from headwise.io.workdir import write_file_atomically

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
SPACE = "\u2581"  # what sentencepiece writes for a space
MODELS = ("gpt2", "llama")
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TEMPLATE, NAMED_TEMPLATE = "tokenizer.chat_template", re.compile(r"tokenizer\.chat_template\.([A-Za-z0-9_-]{1,64})")


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, path: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates.

    Args:
        metadata: of the file.
        folder: where to write.
        path: of the file, for messages.
        max_length: the longest text, in tokens.

    Raises:
        HeadwiseError: the file has no vocabulary, or one of a kind that cannot be rebuilt.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in MODELS:
        raise _error(path, "model", f"is {kind!r}", f"Kinds that can be read: {', '.join(MODELS)}.")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _error(path, "tokens", "is missing")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is not None and not (isinstance(types, np.ndarray) and len(types) == len(tokens)):
        raise _error(path, "token_type", f"does not have one number for each of {len(tokens)} tokens")
    special = {name: _token(metadata, key, tokens, path) for name, key in SPECIAL.items()}
    with tokenizer_errors(f"the tokenizer of {path} cannot be rebuilt", "Use the model's safetensors checkpoint."):
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(metadata, tokens, path)
        else:
            tokenizer, add_bos = _sentencepiece(metadata, tokens, types, special["unk_token"], path)
        _add_tokens(tokenizer, types, special)
        add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
        add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
        _add_template(
            tokenizer, special["bos_token"] if add_bos else None, special["eos_token"] if add_eos else None
        )
        write_file_atomically(folder / "tokenizer.json", lambda to: tokenizer.save(str(to)))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special.items() if token is not None},
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_file_atomically(folder / "tokenizer_config.json", text.encode())
    _write_templates(metadata, folder)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> tuple[Any, bool]:
    """Byte-level BPE, and whether a text begins with a token of its own by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    known = load_gguf_table()["pre_tokenizers"]
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in known:
        raise _error(path, "pre", f"is {pre!r}", f"Kinds that can be read: {', '.join(known)}.")
    row = known[pre]
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise _error(path, "merges", "is missing")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise _error(path, "merges", "has an entry that is not two tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=row["ignore_merges"]))
    pieces: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if row["digits"] else []
    if row["split"]:
        pieces.append(pre_tokenizers.Split(Regex(row["split"]), behavior="isolated"))
    pieces.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=row["split"] is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces) if len(pieces) > 1 else pieces[0]
    if row["nfc"]:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, row["add_bos"]


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: np.ndarray | None, unknown: str | None, path: Path
) -> tuple[Any, bool]:
    """BPE as sentencepiece does it, and whether a text begins with a token of its own by default."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if types is None:
        raise _error(path, "token_type", "is missing")
    # Some files hold a run of spaces as it is.
    pieces = [token.replace(" ", SPACE) if not token.strip(" ") else token for token in tokens]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = _implied_merges(pieces, vocabulary, types)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer, True


def _implied_merges(
    pieces: Sequence[str], vocabulary: Mapping[str, int], types: np.ndarray
) -> list[tuple[str, str]]:
    """Return the merges of a sentencepiece vocabulary.

    Sentencepiece numbers tokens in the order in which it learned them, and merges any two tokens that make a third.
    """
    merges: list[tuple[str, str]] = []
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (UNKNOWN, CONTROL, BYTE):
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _add_tokens(tokenizer: Any, types: np.ndarray | None, special: Mapping[str, str | None]) -> None:
    """Make tokens that a file marks as control or as user-defined one piece of any text."""
    from tokenizers import AddedToken

    named = {token for token in special.values() if token is not None}
    added = []
    for number, kind in enumerate(types if types is not None else []):
        token = tokenizer.id_to_token(number)
        if token is not None and kind in (CONTROL, USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=bool(kind == CONTROL) or token in named))
    present = {str(token.content) for token in added}
    added += [AddedToken(token, normalized=False, special=True) for token in sorted(named - present)]
    tokenizer.add_tokens(added)


def _add_template(tokenizer: Any, bos: str | None, eos: str | None) -> None:
    """Begin and end every text with these tokens."""
    from tokenizers import processors

    ends = [token for token in (bos, eos) if token is not None]
    if not ends:
        return
    first, second = (
        [*([f"{bos}:{part}"] if bos else []), f"${text}:{part}", *([f"{eos}:{part}"] if eos else [])]
        for part, text in enumerate("AB")
    )
    numbers = [(token, tokenizer.token_to_id(token)) for token in sorted(set(ends))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=first, pair=first + second, special_tokens=numbers
    )


def _write_templates(metadata: Mapping[str, Any], folder: Path) -> None:
    for key, text in metadata.items():
        match = NAMED_TEMPLATE.fullmatch(key)
        if not isinstance(text, str) or (key != TEMPLATE and match is None):
            continue
        file = folder / (f"additional_chat_templates/{match[1]}.jinja" if match else "chat_template.jinja")
        file.parent.mkdir(exist_ok=True)
        write_file_atomically(file, text.encode())


def _token(metadata: Mapping[str, Any], key: str, tokens: Sequence[str], path: Path) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is None or number in (-1, 0xFFFFFFFF):
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise _error(path, f"{key}_token_id", f"is {number!r}, and there are {len(tokens)} tokens")
    return tokens[number]


def _error(
    path: Path, key: str, reason: str, hint: str = "Use the model's safetensors checkpoint."
) -> HeadwiseError:
    return HeadwiseError(f"{path}: tokenizer.ggml.{key} {reason}, so its tokenizer cannot be rebuilt.", hint)
