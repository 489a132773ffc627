"""Everything that a user decides about a measurement of decode speed: defaults and legal values, once."""

from __future__ import annotations

from dataclasses import dataclass

from headwise import fields
from headwise.convert.settings import DTYPES
from headwise.fields import check_fields


@dataclass(frozen=True)
class BenchSettings:
    """The settings of a measurement of decode speed.

    Raises:
        SettingError: a value is not legal.
    """

    context: int = fields.length("Tokens in the cache [1024].", default=1024)
    batch: int = fields.number("Sequences decoded together [1].", default=1)
    memory: int | str | None = fields.memory("Also compare at the largest batch that fits this memory.")
    steps: int = fields.number("Decode steps to time [16].", default=16)
    dtype: str = fields.choice("Precision of the weights [bfloat16].", DTYPES, default="bfloat16")
    device: str | None = fields.device()

    def __post_init__(self) -> None:
        check_fields(self)
