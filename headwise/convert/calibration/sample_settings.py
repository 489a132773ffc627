"""Everything that a user decides about sampled text: defaults and legal values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise import fields
from headwise.convert.settings import DTYPES
from headwise.fields import Setting, check_fields, declare
from headwise.schema import parse_count


def _check_jsonl(value: Any) -> Path:
    if not isinstance(value, str | Path) or Path(value).suffix != ".jsonl":
        raise ValueError
    return Path(value)


@dataclass(frozen=True)
class SampleSettings:
    """The settings of text that a model samples from itself.

    Raises:
        SettingError: a value is not legal.
    """

    tokens: int = fields.number(
        "Tokens to sample, such as 40K (40,000) [262144].", parse=parse_count, default=1 << 18
    )
    out: Path | None = declare(
        None,
        Setting(
            "The file, .jsonl [MODEL-samples.jsonl].",
            wanted="a path that ends with .jsonl",
            check=_check_jsonl,
            parse=Path,
            metavar="FILE",
        ),
    )
    force: bool = fields.flag("Replace FILE.")
    seed: int = fields.number("Random seed [0].", minimum=0, default=0)
    device: str | None = fields.device()
    dtype: str | None = fields.choice("Precision of the weights [bfloat16 on a GPU, else float32].", DTYPES)

    def __post_init__(self) -> None:
        check_fields(self)
