"""Loss as a function of position, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Mean nats of the tokens in each stretch of `width` positions.

    Attributes:
        nats: one per stretch, the first starting at position 0.
        width: positions in a stretch.
        tokens: predicted tokens behind the whole curve.
    """

    nats: tuple[float, ...]
    width: int
    tokens: int

    @property
    def length(self) -> int:
        return self.width * len(self.nats)

    def before(self, position: int) -> float:
        """Nats in the last whole stretch that ends at or before `position`."""
        return self.nats[max(position // self.width - 1, 0)]

    @property
    def end(self) -> float:
        """Nats at the far end."""
        return self.nats[-1]

    def to_dict(self) -> dict[str, Any]:
        return {"nats": list(self.nats), "width": self.width, "tokens": self.tokens}
