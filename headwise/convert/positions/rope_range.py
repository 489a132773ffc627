"""How far a model's rotary frequencies hold, for each set of layers: the figures of `inspect` with a context."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headwise.convert.positions.context import RopeSet, rope_sets
from headwise.convert.positions.rope_bound import first_failure, never_turned, smallest_base
from headwise.errors import HeadwiseError
from headwise.models import rope
from headwise.models.architecture import Architecture
from headwise.models.config import positive_size


@dataclass(frozen=True)
class RopeRange:
    """How far the frequencies of some layers hold.

    Attributes:
        layer_type: the type of these layers; None: all layers.
        rotary_dim: rotary dimensions of a head.
        rope_type: the RoPE rule of the config.
        rope_theta: the RoPE base of the config.
        trained: the trained context, in tokens (max_position_embeddings).
        context: the last distance checked, in tokens: the given context, or these layers' window if that is
            shorter.
        first_failure: the first distance with `B(m) < 0`; None if the frequencies hold.
        smallest_base: the smallest unscaled base that holds for `context`; see `rope_bound.SmallestBase`.
        always_from: the base from which all larger bases hold.
        resolution: the relative step between the bases tried.
        never_turned: the fraction of planes without one full turn within the trained context.
    """

    layer_type: str | None
    rotary_dim: int
    rope_type: str
    rope_theta: float
    trained: int
    context: int
    first_failure: int | None
    smallest_base: float
    always_from: float
    resolution: float
    never_turned: float

    @property
    def holds(self) -> bool:
        """Return whether `B(m)` is not negative within the context."""
        return self.first_failure is None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self) | {"holds": self.holds}

    def lines(self) -> list[str]:
        """Return the figures in sentences."""
        where = f"{self.layer_type} layers" if self.layer_type else "all layers"
        verdict = "holds" if self.holds else f"fails from distance {self.first_failure:,}"
        lines = [
            f"{where}: base {self.rope_theta:,.0f} ({self.rope_type}, {self.rotary_dim} rotary dimensions) "
            f"{verdict} within {self.context:,} tokens.",
            f"The smallest base that holds is {self.smallest_base:.3g}; from {self.always_from:.3g} on all bases "
            f"hold (in steps of {self.resolution:.0%}).",
            f"{self.never_turned:.0%} of the planes never completed a turn within {self.trained:,} tokens.",
        ]
        if self.context > self.trained:
            lines.append(
                f"Scaling by any rule but {' and '.join(rope.EXACT_WHEN_SHORT)} is static: it also changes inputs "
                f"of up to {self.trained:,} tokens, for the worse until the model is trained again."
            )
        return lines


def rope_ranges(config: dict[str, Any], architecture: Architecture, context: int) -> list[RopeRange]:
    """Return how far the model's own frequencies hold, for each set of layers (mathematics, section 5).

    Args:
        config: the model's config.json.
        architecture: its row.
        context: the last distance to check, in tokens.

    Raises:
        HeadwiseError: the model has no RoPE, or its rope_parameters give no frequencies.
    """
    trained = positive_size(architecture.stock_config(config), "max_position_embeddings")
    return [_rope_range(rope_set, trained, context) for rope_set in rope_sets(config, architecture)]


def _rope_range(rope_set: RopeSet, trained: int, context: int) -> RopeRange:
    distance = min(context, rope_set.window or context)
    try:
        frequencies, _ = rope.frequencies(rope_set.parameters, rope_set.rotary_dim, trained, context)
    # Each parameter may be legal and their combination not.
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise HeadwiseError(
            f"config.json has rope_parameters that give no frequencies: {error}.", "Correct them in config.json."
        ) from None
    bases = smallest_base(rope_set.rotary_dim, distance)
    unscaled = rope.base_frequencies(rope_set.parameters["rope_theta"], rope_set.rotary_dim)
    return RopeRange(
        layer_type=rope_set.layer_type,
        rotary_dim=rope_set.rotary_dim,
        rope_type=rope.rope_type(rope_set.parameters),
        rope_theta=rope_set.parameters["rope_theta"],
        trained=trained,
        context=distance,
        first_failure=first_failure(frequencies, distance),
        smallest_base=bases.smallest,
        always_from=bases.always_from,
        resolution=bases.resolution,
        never_turned=never_turned(unscaled, trained),
    )
