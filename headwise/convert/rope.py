"""How positions rotate: the rescaling rules, and the bound that says how far a base reaches.

A set of layers turns by `rope_parameters`, a plain dictionary in the spelling of transformers 5 (`rope_type`,
`rope_theta`, `factor`, ...). Everything here maps such a dictionary to another one or to numbers. Mistakes
raise ValueError with the reason; whoever knows the model's name says the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Any]

RULES = ("base", "ntk", "linear", "dynamic", "yarn", "llama3", "longrope")

# A config holds one rope_type. What each source can still become without leaving it: the entries are the rules
# whose result, frequency by frequency, is the rule applied to the source. Dynamic scaling is the plain base up
# to the trained length, so nothing is lost by replacing it.
COMPOSES = {
    "default": RULES,
    "dynamic": RULES,
    "linear": ("base", "ntk", "linear"),
    "yarn": ("yarn",),
    "llama3": ("llama3",),
    "longrope": ("longrope",),
}

# Rules that leave every input up to the trained length exactly as it was.
EXACT_WHEN_SHORT = ("dynamic", "longrope")


def base_frequencies(rope_theta: float, rotary_dim: int) -> Tensor:
    """`rope_theta^{-2f/rotary_dim}`: radians per token of each plane, (rotary_dim / 2,) float64."""
    return rope_theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def frequencies(
    parameters: Parameters, rotary_dim: int, max_position_embeddings: int, length: int | None = None
) -> tuple[Tensor, float]:
    """What a stock class computes from `rope_parameters`.

    Args:
        parameters: transformers 5 `rope_parameters` of one set of layers.
        rotary_dim: numbers of a head that turn.
        max_position_embeddings: of the config; `dynamic` starts to stretch beyond it.
        length: tokens in the input, for the two types that look at it (`dynamic`, `longrope`).

    Returns:
        Radians per token of each plane, (rotary_dim / 2,) float64, and the factor on cosines and sines.

    Raises:
        ValueError: an unknown `rope_type`.
    """
    kind = rope_type(parameters)
    plain = base_frequencies(parameters["rope_theta"], rotary_dim)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / parameters["factor"], 1.0
    if kind == "dynamic":
        factor, longest = parameters["factor"], max(length or 0, max_position_embeddings)
        stretch = factor * longest / max_position_embeddings - (factor - 1)
        return base_frequencies(ntk_base(parameters["rope_theta"], stretch, rotary_dim), rotary_dim), 1.0
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position_embeddings / original
    if kind == "yarn":
        ramp = _yarn_ramp(parameters, rotary_dim, original)
        scaled = plain / factor * ramp + plain * (1 - ramp)
        given = parameters.get("attention_factor")
        return scaled, _yarn_attention(parameters, factor) if given is None else given
    if kind == "llama3":
        turns = original * plain / (2 * math.pi)
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0
    if kind == "longrope":
        factors = parameters["long_factor" if length and length > original else "short_factor"]
        given = parameters.get("attention_factor")
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return plain / torch.tensor(factors, dtype=torch.float64), default if given is None else given
    raise ValueError(f"rope_type {kind!r} is not one of default, {', '.join(RULES[2:])}")


def rope_type(parameters: Parameters) -> str:
    """The `rope_type` of a `rope_parameters` dictionary, in the old spelling (`type`) as well."""
    return parameters.get("rope_type") or parameters.get("type") or "default"


def ntk_base(rope_theta: float, factor: float, rotary_dim: int) -> float:
    """The base whose slowest plane turns `factor` times slower (mathematics, section 5: b s^{d/(d-2)})."""
    if rotary_dim <= 2:
        raise ValueError("a single rotary plane turns by 1 whatever the base is")
    return rope_theta * factor ** (rotary_dim / (rotary_dim - 2))


def rescale(
    parameters: Parameters,
    rule: str,
    *,
    rotary_dim: int,
    trained: int,
    context: int,
    rope_theta: float | None = None,
) -> dict[str, Any]:
    """The `rope_parameters` that carry a model from `trained` to `context` tokens by `rule`.

    Args:
        parameters: what the source has; its scaling is composed with the new one.
        rule: one of `RULES`.
        rotary_dim: numbers of a head that turn.
        trained: the length the source's frequencies are right for.
        context: the length wanted.
        rope_theta: the new base, for rule `base` only.

    Raises:
        ValueError: with the reason why this rule cannot follow this source.
    """
    source, factor = rope_type(parameters), context / trained
    if source not in COMPOSES:
        raise ValueError(f"rope_type {source!r} cannot be rescaled")
    if factor < 1:
        raise ValueError(f"{context} tokens from {trained} is a factor of {factor:g}, below 1")
    if (present := parameters.get("factor")) is not None and present < 1:
        raise ValueError(f"the source's own factor {present:g} is below 1")
    if rule not in COMPOSES[source]:
        raise ValueError(
            f"the source already scales by {source}, a config holds one rope_type, and {rule} on top of "
            f"{source} is neither; {' or '.join(COMPOSES[source])} composes exactly"
        )
    if rule == "base":
        if rope_theta is None or rope_theta <= parameters["rope_theta"]:
            raise ValueError(
                f"a longer context wants a base above the present {parameters['rope_theta']:g}, not {rope_theta}"
            )
        return _kept(parameters) | {"rope_theta": float(rope_theta)}
    if rule == "ntk":
        return _kept(parameters) | {"rope_theta": ntk_base(parameters["rope_theta"], factor, rotary_dim)}
    if source == rule and source != "dynamic":
        return _compose(parameters, factor, rotary_dim, trained)
    fresh = _unscaled(parameters) | {"rope_type": rule, "factor": factor}
    if rule in ("linear", "dynamic"):
        return fresh
    fresh["original_max_position_embeddings"] = trained
    if rule == "llama3":
        return fresh | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rule == "longrope":
        profile = _long_profile(parameters["rope_theta"], factor, rotary_dim, trained)
        # An attention factor would also act below the trained length, where nothing else changes.
        return fresh | {
            "short_factor": [1.0] * len(profile),
            "long_factor": profile,
            "attention_factor": 1.0,
        }
    return fresh


def _compose(parameters: Parameters, factor: float, rotary_dim: int, trained: int) -> dict[str, Any]:
    """The source's own rule, carried further by `factor`."""
    kind = rope_type(parameters)
    composed = dict(parameters) | {"rope_type": kind}
    if kind == "linear":
        return composed | {"factor": parameters["factor"] * factor}
    original = parameters["original_max_position_embeddings"]
    present = parameters.get("factor") or trained / original
    composed |= {"factor": present * factor}
    given = parameters.get("attention_factor")
    default = frequencies(composed | {"factor": present, "attention_factor": None}, rotary_dim, trained)[1]
    if given is not None and given not in (1.0, default):
        raise ValueError(
            f"the source sets attention_factor {given:g} by hand, and how it grows with the context is not known"
        )
    if given == default and given != 1.0:
        del composed["attention_factor"]
    if kind == "longrope":
        profile = _long_profile(parameters["rope_theta"], factor, rotary_dim, trained)
        composed["long_factor"] = [a * b for a, b in zip(parameters["long_factor"], profile, strict=True)]
    return composed


def _kept(parameters: Parameters) -> dict[str, Any]:
    """The source without what `dynamic` adds, which a new base replaces; other scaling stays."""
    return _unscaled(parameters) if rope_type(parameters) == "dynamic" else dict(parameters)


def _unscaled(parameters: Parameters) -> dict[str, Any]:
    """Base and rotary share: what no rule adds."""
    own = ("rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor")
    return {k: v for k, v in parameters.items() if k not in own} | {"rope_type": "default"}


def _long_profile(rope_theta: float, factor: float, rotary_dim: int, trained: int) -> list[float]:
    """Divisors per plane for `longrope`, which leaves them open: YaRN's (LongRoPE finds its own by a search)."""
    yarn = {"rope_type": "yarn", "rope_theta": rope_theta, "factor": factor}
    scaled, _ = frequencies(yarn | {"original_max_position_embeddings": trained}, rotary_dim, trained)
    return (base_frequencies(rope_theta, rotary_dim) / scaled).tolist()


def _yarn_ramp(parameters: Parameters, rotary_dim: int, original: int) -> Tensor:
    """0 on planes that turn often within `original` tokens, 1 on those that do not (Peng et al. 2023, eq. 18)."""

    def plane(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = plane(parameters.get("beta_fast") or 32), plane(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(rotary_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def _yarn_attention(parameters: Parameters, factor: float) -> float:
    """The factor on cosines and sines that sharpens attention (Peng et al. 2023, eq. 22)."""

    def sharpening(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if (mscale := parameters.get("mscale")) and (all_dim := parameters.get("mscale_all_dim")):
        return sharpening(mscale) / sharpening(all_dim)
    return sharpening(1.0)


def similarity(frequencies: Tensor, length: int, start: int = 0) -> Tensor:
    """`B(m) = sum_f cos(m w_f)`, how much more a query favours a similar key than a random one m tokens away.

    With m = a + j, a cosine of a sum is a product, so the whole curve is one matrix product of two tables of
    about sqrt(length) rows.

    Args:
        frequencies: (planes,) radians per token.
        length: the last distance.
        start: the first one.

    Returns:
        (length - start + 1,) float64 (Men et al. 2024, arXiv 2405.14591).
    """
    count = length - start + 1
    step = math.isqrt(count) + 1
    steps = torch.arange(start, length + 1, step, dtype=torch.float64)
    coarse = torch.outer(steps, frequencies.double())
    fine = torch.outer(torch.arange(step, dtype=torch.float64), frequencies.double())
    left = torch.cat([coarse.cos(), -coarse.sin()], dim=1)
    return (left @ torch.cat([fine.cos(), fine.sin()], dim=1).T).flatten()[:count]


def first_failure(frequencies: Tensor, length: int) -> int | None:
    """The first distance up to `length` with `B(m) < 0`, or None: the frequencies reach that far."""
    start, block = 0, 4096
    while start <= length:
        end = min(start + block - 1, length)
        negative = (similarity(frequencies, end, start) < 0).nonzero()
        if len(negative):
            return start + int(negative[0])
        start, block = end + 1, min(2 * block, 1 << 20)
    return None


@dataclass(frozen=True)
class SmallestBase:
    """`smallest`: the least base on the grid that holds; `always`: from here on every one up to `searched` does.

    Between the two some bases hold and some fail: validity is not monotone in the base.
    """

    smallest: float
    always: float
    searched: float
    resolution: float


def smallest_base(rotary_dim: int, length: int, resolution: float = 0.02, beyond: float = 30) -> SmallestBase:
    """Search a geometric grid of bases, from 10 upwards, for those that reach `length`.

    Args:
        rotary_dim: numbers of a head that turn, at least 4.
        length: the context wanted.
        resolution: the grid's relative step. What holds only between two grid points is not seen.
        beyond: the search ends this many times above the last base that fails.
    """
    if rotary_dim < 4:
        raise ValueError("a single rotary plane turns by 1 whatever the base is")
    exponent = math.ceil(math.log(10) / math.log1p(resolution))
    smallest = always = None
    while True:
        base = (1 + resolution) ** exponent
        if first_failure(base_frequencies(base, rotary_dim), length) is not None:
            always = None
        else:
            smallest, always = smallest or base, always or base
            if base > beyond * always:
                return SmallestBase(smallest, always, base, resolution)
        exponent += 1


def never_turned(frequencies: Tensor, trained: int) -> float:
    """Share of planes that did not complete one turn in `trained` tokens: they meet new angles beyond."""
    return float((frequencies * trained < 2 * math.pi).double().mean())


@dataclass(frozen=True)
class Recommendation:
    """A rule, its base where the rule is `base`, and why."""

    rule: str
    rope_theta: float | None
    reason: str


def recommend(
    parameters: Parameters, *, rotary_dim: int, trained: int, context: int, uptraining: bool
) -> Recommendation:
    """The rule for a model's rotary width, trained length and target, with or without uptraining after it."""
    source = rope_type(parameters)
    if source in ("yarn", "llama3", "longrope"):
        return Recommendation(source, None, f"the source already scales by {source}: only it composes exactly")
    if source == "linear":
        return Recommendation("ntk", None, "on a linearly scaled source a larger base composes exactly")
    if not uptraining:
        turned = 1 - never_turned(base_frequencies(parameters["rope_theta"], rotary_dim), trained)
        return Recommendation(
            "yarn",
            None,
            f"without training no plane may meet an angle it never saw: yarn leaves the fast planes of the "
            f"{turned:.0%} that completed a turn in {trained} tokens and slows the others",
        )
    ntk = ntk_base(parameters["rope_theta"], context / trained, rotary_dim)
    failure = first_failure(base_frequencies(ntk, rotary_dim), context)
    if failure is None:
        return Recommendation("ntk", None, f"its base {ntk:.6g} holds to {context} tokens; training does the rest")
    needed = max(ntk, smallest_base(rotary_dim, context).always)
    return Recommendation(
        "base",
        needed,
        f"ntk's base {ntk:.6g} fails from distance {failure}; from {needed:.6g} on every base holds to {context}",
    )
