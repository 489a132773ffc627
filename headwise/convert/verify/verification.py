"""The outcome of checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verification:
    """The checks made, each (name, passed, detail)."""

    checks: tuple[tuple[str, bool, str], ...]

    @property
    def passed(self) -> bool:
        """Return whether all checks passed."""
        return all(passed for _, passed, _ in self.checks)

    @property
    def failures(self) -> str:
        """Return the failed checks with their details, as one line of text."""
        return "; ".join(f"{name}: {detail}" for name, passed, detail in self.checks if not passed)

    def to_dict(self) -> dict[str, Any]:
        """Return the checks as plain data."""
        return {
            "passed": self.passed,
            "checks": [{"name": n, "passed": p, "detail": d} for n, p, d in self.checks],
        }
