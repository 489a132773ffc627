"""Compute rotary frequencies, and rescale them for a longer context.

`rope_parameters` describes the RoPE of a set of layers. It is a plain dictionary with the keys of transformers 5
(`rope_type`, `rope_theta`, `factor`, ...). The functions map such a dictionary to another one or to numbers. They
raise ValueError with the reason; the caller adds the model's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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

# The fields of `rope_parameters` that belong to one rule.
SCALING_FIELDS = (
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
)


def base_frequencies(rope_theta: float, rotary_dim: int) -> Tensor:
    """Return `rope_theta^{-2f/rotary_dim}`: radians per token of each plane, (rotary_dim / 2,) float64.

    Args:
        rope_theta: the RoPE base.
        rotary_dim: number of rotary dimensions.
    """
    return rope_theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def frequencies(
    parameters: Parameters, rotary_dim: int, max_position_embeddings: int, length: int | None = None
) -> tuple[Tensor, float]:
    """Compute the frequencies and the attention factor as a stock class does from `rope_parameters`.

    Args:
        parameters: transformers 5 `rope_parameters` of one set of layers.
        rotary_dim: number of rotary dimensions.
        max_position_embeddings: of the config; `dynamic` stretches longer inputs only.
        length: tokens in the input, for the two types that depend on it (`dynamic`, `longrope`).

    Returns:
        Radians per token of each plane, (rotary_dim / 2,) float64, and the factor on cosines and sines.

    Raises:
        ValueError: an unknown `rope_type`.
    """
    kind = rope_type(parameters)
    if kind not in COMPOSES:
        raise ValueError(f"rope_type {kind!r} is not one of {', '.join(COMPOSES)}")
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
    factors = parameters["long_factor" if length and length > original else "short_factor"]
    given = parameters.get("attention_factor")
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return plain / torch.tensor(factors, dtype=torch.float64), default if given is None else given


def rope_type(parameters: Parameters) -> str:
    """Return the `rope_type` of a `rope_parameters` dictionary, also under its old key `type`.

    Args:
        parameters: the `rope_parameters`.
    """
    return parameters.get("rope_type") or parameters.get("type") or "default"


def unscaled(parameters: Parameters) -> dict[str, Any]:
    """Return the base and the rotary share, without the fields of any rule.

    Args:
        parameters: the `rope_parameters` of one set of layers.
    """
    return {k: v for k, v in parameters.items() if k not in SCALING_FIELDS} | {"rope_type": "default"}


def length_reached(parameters: Parameters, max_position_embeddings: int, original: int | None = None) -> int:
    """Return the number of tokens that a model's frequencies are scaled for already.

    The configs of `linear`, `dynamic` and `yarn` may keep `max_position_embeddings` as trained. Their length is
    then the original length times the factor. The other rules state the whole length.

    Args:
        parameters: the `rope_parameters` of one set of layers.
        max_position_embeddings: of the config.
        original: the trained length, where the config has it outside of `parameters`.
    """
    if rope_type(parameters) not in ("linear", "dynamic", "yarn") or not parameters.get("factor"):
        return max_position_embeddings
    start: int = parameters.get("original_max_position_embeddings") or original or max_position_embeddings
    return max(max_position_embeddings, round(start * float(parameters["factor"])))


def ntk_base(rope_theta: float, factor: float, rotary_dim: int) -> float:
    """Return the base that slows the slowest plane by `factor` (mathematics, section 5: b s^{d/(d-2)}).

    Args:
        rope_theta: the present base.
        factor: ratio of the present frequency of the slowest plane to its new frequency.
        rotary_dim: number of rotary dimensions.

    Raises:
        ValueError: there is only one plane, and no base slows it.
    """
    if rotary_dim <= 2:
        raise ValueError("a single rotary plane turns by 1 whatever the base is")
    result: float = rope_theta * factor ** (rotary_dim / (rotary_dim - 2))
    return result


def rescale(
    parameters: Parameters,
    rule: str,
    *,
    rotary_dim: int,
    trained: int,
    context: int,
    rope_theta: float | None = None,
) -> dict[str, Any]:
    """Return the `rope_parameters` that extend a model from `trained` to `context` tokens by `rule`.

    Args:
        parameters: the source's parameters; its scaling is composed with the new one.
        rule: one of `RULES`.
        rotary_dim: number of rotary dimensions.
        trained: the context length that the source was trained for.
        context: the new context length.
        rope_theta: the new base, for rule `base` only.

    Raises:
        ValueError: this rule cannot be applied to this source; the message gives the reason.
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
            f"the source already scales by {source}, a config holds one rope_type, and of the rules only "
            f"{' or '.join(COMPOSES[source])} composes with it"
        )
    if rule == "base":
        if rope_theta is None:
            raise ValueError("it needs the new base")
        if rope_theta <= parameters["rope_theta"]:
            raise ValueError(
                f"a longer context needs a base above the present {parameters['rope_theta']:g}, not {rope_theta:g}"
            )
        return _kept(parameters) | {"rope_theta": float(rope_theta)}
    if rule == "dynamic":
        ntk_base(parameters["rope_theta"], factor, rotary_dim)
    if rule == "ntk":
        return _kept(parameters) | {"rope_theta": ntk_base(parameters["rope_theta"], factor, rotary_dim)}
    if source == rule and source != "dynamic":
        return _compose(parameters, factor, rotary_dim, trained)
    fresh = unscaled(parameters) | {"rope_type": rule, "factor": factor}
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
    """Return the source's own rule, extended by `factor`."""
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
    """Return the source without the fields of `dynamic`, which a new base replaces; other scaling remains."""
    return unscaled(parameters) if rope_type(parameters) == "dynamic" else dict(parameters)


def _long_profile(rope_theta: float, factor: float, rotary_dim: int, trained: int) -> list[float]:
    """Return YaRN's divisors per plane for `longrope`, which prescribes none (LongRoPE searches for its own)."""
    yarn = {"rope_type": "yarn", "rope_theta": rope_theta, "factor": factor}
    scaled, _ = frequencies(yarn | {"original_max_position_embeddings": trained}, rotary_dim, trained)
    return (base_frequencies(rope_theta, rotary_dim) / scaled).tolist()


def _yarn_ramp(parameters: Parameters, rotary_dim: int, original: int) -> Tensor:
    """Return YaRN's ramp: 0 on planes that turn often within `original` tokens, 1 on slow planes.

    See Peng et al. 2023, eq. 18.
    """

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
    """Return the factor on cosines and sines that sharpens attention (Peng et al. 2023, eq. 22)."""

    def sharpening(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if (mscale := parameters.get("mscale")) and (all_dim := parameters.get("mscale_all_dim")):
        return sharpening(mscale) / sharpening(all_dim)
    return sharpening(1.0)
