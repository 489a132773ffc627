"""The settings of a verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headwise import fields
from headwise.errors import SettingError
from headwise.fields import check_fields


@dataclass(frozen=True)
class VerifySettings:
    """The settings of a verification.

    Raises:
        SettingError: a value is not legal, or contradicts another one.
    """

    against: str | Path | None = fields.model("The parent, to compare with.")
    hashes: bool = fields.flag("Only compare tensors and files with the hashes in headwise.json.")
    device: str | None = fields.device("Where models and their layers run: cpu, cuda or cuda:N [cpu].")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("against", "device"):
            if self.hashes and getattr(self, name) is not None:
                raise SettingError(name, f"`hashes` compares with headwise.json alone: leave out `{name}`.")
