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
        return all(passed for _, passed, _ in self.checks)

    @property
    def failures(self) -> str:
        """The failed checks, in words."""
        return "; ".join(f"{name}: {detail}" for name, passed, detail in self.checks if not passed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": [{"name": n, "passed": p, "detail": d} for n, p, d in self.checks],
        }
