"""The outcome of checks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from headwise.errors import GateFailed

# The checks of a new folder, in their order. A failure of each of them can be accepted.
CHECKS = ("tensors", "layout", "cache", "function", "selection", "parent", "loading")


class Check(NamedTuple):
    """One check.

    Attributes:
        name: one of `CHECKS`, or "finite", "record" or "hashes".
        passed: whether it passed.
        detail: the measured value and its limit.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """The checks made.

    Attributes:
        checks: in the order in which they were made.
        accepted: the failed checks that the user accepted.
    """

    checks: tuple[Check, ...]
    accepted: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Return whether all checks passed."""
        return all(passed for _, passed, _ in self.checks)

    @property
    def failures(self) -> str:
        """Return the failed checks with their details, as one line of text."""
        return "; ".join(f"{name}: {detail}" for name, passed, detail in self.checks if not passed)

    @property
    def refused(self) -> tuple[str, ...]:
        """Return the names of the failed checks that were not accepted."""
        return tuple(name for name, passed, _ in self.checks if not passed and name not in self.accepted)

    def accepting(self, names: Collection[str]) -> Verification:
        """Return the same checks with failures accepted.

        Args:
            names: the checks whose failure is accepted; those that passed are left out.
        """
        return replace(self, accepted=tuple(n for n, passed, _ in self.checks if not passed and n in names))

    def require(self, folder: Path) -> None:
        """Raise an error with the ways on, unless every failed check was accepted.

        Args:
            folder: where the unpublished result is.

        Raises:
            GateFailed: a check failed; the message has its value, its limit and the ways on.
        """
        if not self.refused:
            return
        raise GateFailed(
            f"The result failed its verification: {self.failures}.",
            f"The result is kept in {folder}: `headwise verify {folder}` repeats the checks. The same call with "
            f"`resume` and `accept` {' '.join(self.refused)} publishes it and records the failure; `force` begins "
            "again.",
        )

    def __str__(self) -> str:
        """Return a line for each check."""
        return "\n".join(f"{name}: {'passed' if passed else 'FAILED'}. {d}" for name, passed, d in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the checks as plain data."""
        return {
            "passed": self.passed,
            "checks": [Check(*check)._asdict() for check in self.checks],
            "accepted": list(self.accepted),
        }
