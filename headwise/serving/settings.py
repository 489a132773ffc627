"""What a user decides about serving a model: engines, parallelism, memory and cache type, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwise import fields
from headwise.errors import SettingError
from headwise.fields import check_fields, is_given, settings_of
from headwise.serving.engines import ENGINES, require_cache_dtype

# The fraction of a GPU's memory that vLLM 0.33 uses by default (gpu_memory_utilization).
USED_MEMORY = 0.92
# Element types of a cache and their bytes.
CACHE_DTYPES = {"bf16": 2, "fp8": 1}
# Less memory of a GPU is a number without its unit.
LEAST_MEMORY = 10**9
# The GPUs of cards.yaml.
CARDS = ("a100-80gb", "b200", "h100", "h200", "l4", "l40s", "mi300x", "rtx-4090")


@dataclass(frozen=True)
class ServingSettings:
    """The settings of a serving forecast; none given: no forecast.

    Raises:
        SettingError: a value is not legal, or contradicts another one.
    """

    engines: Sequence[str] = fields.several(
        f"Reasons and commands of this engine for each layout: {', '.join(ENGINES)}; may be repeated.",
        ENGINES,
        metavar="ENGINE",
        flag="--engine",
        section="Serving",
    )
    tp: int | None = fields.number("GPUs of tensor parallelism [1].", section="Serving")
    dcp: int | None = fields.number("GPUs that divide the cache of a sequence [1].", section="Serving")
    memory: int | str | None = fields.memory("Memory of one GPU [the card's].", section="Serving")
    cache_dtype: str | None = fields.choice(
        "Element type of the cache [bf16].", tuple(CACHE_DTYPES), section="Serving"
    )
    card: str | None = fields.choice(
        f"GPU, for its memory and the time of a decode step: {', '.join(CARDS)}.",
        CARDS,
        metavar="CARD",
        section="Serving",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.tp or 1) % (self.dcp or 1):
            hint = None if self.tp else "Give `tp` too."
            raise SettingError("dcp", f"`dcp` {self.dcp} does not divide `tp` {self.tp or 1}.", hint)
        if isinstance(self.memory, int) and self.memory < LEAST_MEMORY:
            raise SettingError(
                "memory",
                f"`memory` is {self.memory:,} bytes, which is less than 1 GB.",
                "Give at least 1 GB with its unit, such as 80GB.",
            )
        require_cache_dtype(self.engines, self.cache_dtype or "bf16")

    @property
    def forecasts(self) -> bool:
        """Return whether a forecast is wanted."""
        return any(is_given(self, name) for name in settings_of(self) if name != "engines")
