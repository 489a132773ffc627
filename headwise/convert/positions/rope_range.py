"""How far a model's positions carry: what `inspect --context N` says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headwise.convert.positions import rope_bound as bound
from headwise.convert.positions.context import Rotation, rotations
from headwise.errors import HeadwiseError
from headwise.models import rope
from headwise.models.architecture import Architecture
from headwise.models.config import positive_size


@dataclass(frozen=True)
class Reach:
    """How far the frequencies of some layers carry, as `inspect --context` reports it.

    Attributes:
        layer_type: which layers; None for all.
        rotary_dim, rope_type, rope_theta: what they turn by now.
        trained: tokens the model was made for (its max_position_embeddings).
        context: the distance asked about, or these layers' window where that is shorter.
        first_failure: the first distance with `B(m) < 0`, None where the frequencies hold.
        smallest_base, always_from, resolution: unscaled bases that hold for `context`; see `bound.SmallestBase`.
        never_turned: share of planes that never completed a turn in `trained` tokens.
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
        return self.first_failure is None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}

    def lines(self) -> list[str]:
        """The same in sentences."""
        where = f"{self.layer_type} layers" if self.layer_type else "all layers"
        verdict = "holds" if self.holds else f"fails from distance {self.first_failure:,}"
        lines = [
            f"{where}: base {self.rope_theta:,.0f} ({self.rope_type}, {self.rotary_dim} rotary numbers) "
            f"{verdict} within {self.context:,} tokens.",
            f"The smallest base that holds is {self.smallest_base:.3g}; from {self.always_from:.3g} on all do "
            f"(bases in steps of {self.resolution:.0%}).",
            f"{self.never_turned:.0%} of the planes never completed a turn within {self.trained:,} tokens.",
        ]
        if self.context > self.trained:
            lines.append(
                f"Scaling is static except by {' and '.join(rope.EXACT_WHEN_SHORT)}: it changes inputs of up to "
                f"{self.trained:,} tokens too, for the worse until the model is trained on."
            )
        return lines


def reach(config: dict[str, Any], architecture: Architecture, context: int) -> list[Reach]:
    """How far the model's own frequencies carry, for each set of layers (mathematics, section 5)."""
    trained = positive_size(architecture.stock_config(config), "max_position_embeddings")
    return [_reach(r, trained, context) for r in rotations(config, architecture)]


def _reach(rotation: Rotation, trained: int, context: int) -> Reach:
    distance = min(context, rotation.window or context)
    try:
        turning, _ = rope.frequencies(rotation.parameters, rotation.rotary_dim, trained, context)
    # Parameters may each be in order and still not belong together.
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise HeadwiseError(f"config.json has rope_parameters from which no frequencies follow: {error}.") from None
    found = bound.smallest_base(rotation.rotary_dim, distance)
    return Reach(
        rotation.layer_type,
        rotation.rotary_dim,
        rope.rope_type(rotation.parameters),
        rotation.parameters["rope_theta"],
        trained,
        distance,
        bound.first_failure(turning, distance),
        found.smallest,
        found.always,
        found.resolution,
        bound.never_turned(rope.base_frequencies(rotation.parameters["rope_theta"], rotation.rotary_dim), trained),
    )
