"""Turn values into text and plain JSON: sizes, durations, dtypes, layouts."""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, Protocol

_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (direction overrides), surrogates, separators


def size(num_bytes: float) -> str:
    """Return bytes in decimal units: 13500000000 -> "13.5 GB".

    Args:
        num_bytes: 0 or more.
    """
    power = min(4, int(math.log10(max(num_bytes, 1)) / 3))
    value = num_bytes / 1000**power
    digits = f"{value:.0f}" if power == 0 or value >= 99.95 else f"{value:.3g}"
    return f"{digits} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def factor(value: float) -> str:
    """Return a ratio with three digits, whole from a thousand up: "75.3", "3,780", "1.7e+10".

    Args:
        value: 0 or more.
    """
    return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:,.3g}"


_BYTES: dict[str, int] = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


def parse_bytes(text: int | str) -> int:
    """Return the bytes of "5GB" (powers of ten), "24GiB" (powers of two) or a plain number.

    Args:
        text: a size; a number is returned unchanged.

    Raises:
        ValueError: the text is not a size above 0.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    units = {unit.upper(): scale for unit, scale in _BYTES.items()}
    if not match or match[2].upper() not in units or not float(match[1]):
        raise ValueError(f"{text!r} is not a size such as 5GB")
    return round(float(match[1]) * units[match[2].upper()])


def duration(seconds: float) -> str:
    """Return a duration for a reader: 12.3 -> "12 s", 75 -> "1:15", 3700 -> "1:01:40".

    Args:
        seconds: 0 or more.
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def token_count(number: int) -> str:
    """Return "32K" for 32768 tokens, and "1,000" for 1000.

    Args:
        number: of tokens.
    """
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"


def parse_length(word: str) -> int:
    """Return 32768 for "32K" or "32768": tokens in a sequence, as `token_count` prints them.

    Args:
        word: of the command line.

    Raises:
        ValueError: the word is not a whole number.
    """
    return 1024 * int(word[:-1]) if word[-1:] in ("K", "k") else int(word)


def dtype_name(dtype: object) -> str:
    """Return "bfloat16" for torch.bfloat16.

    Args:
        dtype: of torch; typed as object, so that this module needs no torch.
    """
    return str(dtype).removeprefix("torch.")


def clean(text: object) -> str:
    """Return text with an escape for every character that a terminal would execute or hide.

    Args:
        text: any object; its string is cleaned.
    """
    return "".join(
        c if unicodedata.category(c) not in _UNSAFE else c.encode("unicode_escape").decode() for c in str(text)
    )


def plain(value: Any) -> Any:
    """Return a value as strict JSON.

    Args:
        value: any value. A number that is not finite becomes None, an object its `to_dict()` or its string.
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def public_text(text: str) -> str:
    """Return a word or a line with every absolute path cut to its last part: its folders may be private.

    Args:
        text: a path, `key=PATH`, or a list of paths such as [/a/x,/b/y]. Text of several lines stays as it is.
    """
    if "\n" in text:
        return text
    key, sign, value = text.rpartition("=")
    if Path(value).is_absolute():
        return f"{key}{sign}{Path(value).name or value}"
    return re.sub(r"(?<![^=,\[\s\"'])/[^=,\[\]\s\"']*/(?=[^/])", "", text)


def public_data(value: Any) -> Any:
    """Return plain data in which every absolute path is its last part, keys of mappings included.

    Args:
        value: strings, numbers, mappings and lists.
    """
    if isinstance(value, Mapping):
        named: dict[str, Any] = {}
        for key, item in value.items():
            name = public_text(str(key))
            # Files of one name in two folders stay two.
            named[f"{name} ({len(named) + 1})" if name in named else name] = public_data(item)
        return named
    if isinstance(value, list | tuple):
        return [public_data(item) for item in value]
    return public_text(str(value)) if isinstance(value, str | Path) else value


def public_command(words: Iterable[str]) -> str:
    """Return a command line in which every absolute path is its last part.

    Args:
        words: of the command.
    """
    return shlex.join(map(public_text, words))


def norm_residuals(layers: Mapping[Any, Mapping[str, Any]]) -> str | None:
    """Return the range of the key residual over the layers in one sentence; None without linear maps for norms.

    Args:
        layers: the report of every converted layer.
    """
    residuals = sorted(report["key_residual"] for report in layers.values() if "key_residual" in report)
    if not residuals:
        return None
    return (
        f"Key residual of the {len(residuals)} layers: smallest {residuals[0]:.4f}, "
        f"median {median(residuals):.4f}, largest {residuals[-1]:.4f}."
    )


def plain_fields(value: Any, *hidden: str) -> dict[str, Any]:
    """Return the fields of a dataclass, with dtypes as names.

    Args:
        value: a dataclass.
        *hidden: names of the fields to leave out.
    """
    shown = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in hidden}
    return {key: dtype_name(item) if type(item).__name__ == "dtype" else item for key, item in shown.items()}


class _Indexer(Protocol):
    @property
    def index_topk(self) -> int: ...


class _Layout(Protocol):
    """The part of `headwise.models.layout.AttentionLayout` that its name needs."""

    @property
    def kind(self) -> str: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def kv_lora_rank(self) -> int | None: ...
    @property
    def qk_rope_head_dim(self) -> int | None: ...
    @property
    def part(self) -> str: ...
    @property
    def indexer(self) -> _Indexer | None: ...
    @property
    def shares_indexer(self) -> bool: ...


def latent_name(kv_lora_rank: int, qk_rope_head_dim: int | None) -> str:
    """Return the name of an MLA layout by its cache row, such as "MLA 512+64".

    Args:
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the shared rotary key.
    """
    return f"MLA {kv_lora_rank}+{qk_rope_head_dim}"


def layout_names(layouts: Sequence[_Layout]) -> str:
    """Return the name of a model's layouts, such as "GQA, 8 KV heads"; parts such as an encoder are named.

    Args:
        layouts: of the layers; each different name appears once.
    """
    layouts = [layout for layout in layouts if layout.kind != layout.part]  # a layer without attention has none
    several = len({layout.part for layout in layouts}) > 1
    words = []
    own = sum(not layout.shares_indexer for layout in layouts)
    shared = f" of {own} indexer{'s' * (own > 1)}" if own < len(layouts) else ""
    for layout in dict.fromkeys(layouts):
        part = f"{layout.part} " if several else ""
        if layout.kv_lora_rank is not None:
            selected = f", top {layout.indexer.index_topk:,} keys{shared}" if layout.indexer else ""
            words.append(part + latent_name(layout.kv_lora_rank, layout.qk_rope_head_dim) + selected)
        else:
            count = layout.num_key_value_heads
            words.append(part + ("MQA" if layout.kind == "mqa" else f"{layout.kind.upper()}, {count} KV heads"))
    return "; ".join(dict.fromkeys(words))
