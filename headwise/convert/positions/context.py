"""Extend a model's context: its config with rescaled positions, checked against the stock class."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from headwise import registry
from headwise.compat import run_rotary
from headwise.convert.positions.rope_bound import first_failure, recommend_rule
from headwise.errors import HeadwiseError, SettingError
from headwise.models import rope
from headwise.models.architecture import Architecture
from headwise.models.layout import text_layouts
from headwise.models.protocol import AttentionModel
from headwise.models.table import both_rope_spellings


@dataclass(frozen=True)
class RopeSet:
    """The layers of a model that share one set of rotary frequencies.

    Attributes:
        layer_type: the key of their `rope_parameters`; None if one set serves all layers.
        parameters: transformers 5 `rope_parameters`, defaults filled in by the stock class.
        rotary_dim: rotary dimensions of a head.
        window: the largest sliding window of these layers, in tokens; None if one of them has no window.
    """

    layer_type: str | None
    parameters: dict[str, Any]
    rotary_dim: int
    window: int | None

    @property
    def where(self) -> str:
        """Return the name of the layers, for messages."""
        return f"{self.layer_type} layers" if self.layer_type else "all layers"


def rope_sets(config: dict[str, Any], architecture: AttentionModel) -> list[RopeSet]:
    """Return the sets of frequencies of a model, one per layer type if the stock class keeps several.

    Args:
        config: the model's config.json.
        architecture: its row.

    Raises:
        HeadwiseError: no layer has RoPE.
    """
    stock = architecture.stock_config(config)
    layouts = text_layouts(architecture.layouts(config))
    if not any(layout.rotary_dim for layout in layouts):
        raise HeadwiseError(
            f"{architecture.model_type} does not rotate its positions, so there is no RoPE to rescale.",
            "Leave out `context`; a longer context for this model needs training from its own recipe.",
        )
    parameters = stock.rope_parameters
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    layer_types = getattr(stock, "layer_types", None) or [None] * len(layouts)
    sets = []
    for key, values in (nested or {None: parameters}).items():
        rotary = [a for a, kind in zip(layouts, layer_types, strict=True) if a.rotary_dim and key in (None, kind)]
        if not rotary:
            continue
        windows = [layout.sliding_window for layout in rotary]
        window = None if None in windows else max(w for w in windows if w is not None)
        sets.append(RopeSet(key, dict(values), rotary[0].rotary_dim, window))
    return sets


def extend_context(
    config: dict[str, Any],
    architecture: Architecture,
    *,
    context: int,
    rule: str = "auto",
    rope_theta: float | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Rescale the rotary frequencies of a model for a longer context.

    Layers whose window is within the present context keep their frequencies if the stock class holds theirs apart
    (Gemma 3's sliding layers).

    Args:
        config: the source's config.json.
        architecture: its row.
        context: the new context, in tokens.
        rule: the name of a RoPE rule in the registry, or "auto".
        rope_theta: the new base; makes the rule `base`.

    Returns:
        A new config in both spellings, checked against the stock class, and lines for the plan.

    Raises:
        SettingError: the rule does not apply to this model, or the context is not longer.
        HeadwiseError: the model has no RoPE, or its stock class cannot express the rule.
    """
    if rope_theta is not None and rule == "auto":
        rule = "base"
    if rule != "auto":
        registry.find_method("rope", rule, field="rope")
    if (rope_theta is not None) != (rule == "base"):
        problem = "needs the new base" if rule == "base" else f"takes no `rope_theta`, which is {rope_theta:g}"
        raise SettingError(
            "rope_theta", f"`rope` {rule} {problem}.", "Give both: `rope` base and `rope_theta` 1000000."
        )
    sets = rope_sets(config, architecture)
    stock = architecture.stock_config(config)
    scaled = getattr(stock, "rope_scaling_layers", None)
    if scaled is not None and not set(range(stock.num_hidden_layers)).issubset(scaled):
        raise HeadwiseError(
            f"config.json has rope_scaling_layers: {scaled}, and no scaling reaches the other layers of this "
            f"{architecture.model_type} model.",
            "Leave out `context`.",
        )
    trained = stock.max_position_embeddings
    reached = max(_length_reached(rope_set, stock) for rope_set in sets)
    unclear = [note for rope_set in sets if (note := _unclear_length(rope_set, stock))]
    if context <= reached:
        kinds = " and ".join(sorted({rope.rope_type(s.parameters) for s in sets} - {"default"}))
        present = f"the {reached} tokens that its {kinds} scaling reaches already"
        raise SettingError(
            "context",
            f"`context` {context} is not larger than "
            f"{present if reached > trained else f'the present max_position_embeddings: {trained}'}.",
            " ".join([f"Give more than {reached} tokens, or leave out `context`.", *unclear]),
        )
    rescaled = [s for s in sets if s.window is None or s.window > trained]
    if not rescaled and rule != "auto":
        rescaled = sets
    changed: dict[str | None, dict[str, Any]] = {}
    notes = unclear + [
        f"{s.where} attend to at most {s.window:,} tokens: their frequencies stay"
        for s in sets
        if s not in rescaled
    ]
    for rope_set in rescaled:
        chosen = rule
        # The new factor counts from the length that the source's scaling reaches. Dynamic scaling is replaced.
        dynamic = rope.rope_type(rope_set.parameters) == "dynamic"
        start = trained if dynamic else _length_reached(rope_set, stock)
        sizes = {"rotary_dim": rope_set.rotary_dim, "trained": start, "context": context}
        try:
            if rule == "auto":
                advice = recommend_rule(rope_set.parameters, rotary_dim=rope_set.rotary_dim, trained=start)
                chosen = advice.rule
                notes.append(f"auto chose {chosen} for {rope_set.where}: {advice.reason}")
            parameters = rope.rescale(rope_set.parameters, chosen, **sizes, rope_theta=rope_theta)
        except ValueError as error:
            raise SettingError("rope", f"`rope` {chosen} cannot extend this model: {error}.") from error
        changed[rope_set.layer_type] = parameters
        notes += _notes(rope_set, parameters, start, context)
    try:
        new = _write(config, architecture, changed, trained, context)
        verify_frequencies(new, architecture, context)
    except HeadwiseError as error:
        kinds = " and ".join(sorted({rope.rope_type(parameters) for parameters in changed.values()}))
        raise HeadwiseError(
            f"{architecture.model_type} cannot express {kinds} scaling: {error.message}",
            error.hint or "Choose another `rope`; ntk needs nothing but rope_theta.",
        ) from error
    return new, notes


def _length_reached(rope_set: RopeSet, stock: Any) -> int:
    """Return the length that the frequencies of some layers are scaled for.

    A config with frequencies for each type of layer states the whole length in `max_position_embeddings`.
    """
    length: int = stock.max_position_embeddings
    if rope_set.layer_type is not None:
        return length
    original = getattr(stock, "original_max_position_embeddings", None)
    return rope.length_reached(rope_set.parameters, length, original if isinstance(original, int) else None)


def _unclear_length(rope_set: RopeSet, stock: Any) -> str:
    """Return a line for a linear scaling whose config does not show if its length includes the factor; else ''."""
    factor = rope_set.parameters.get("factor")
    known = rope_set.parameters.get("original_max_position_embeddings") or getattr(
        stock, "original_max_position_embeddings", None
    )
    if rope.rope_type(rope_set.parameters) != "linear" or known or rope_set.layer_type is not None or not factor:
        return ""
    length = stock.max_position_embeddings
    return (
        f"max_position_embeddings: {length} is taken as the length before the linear factor {factor:g}. If it "
        f"includes the factor, add original_max_position_embeddings: {round(length / factor)} to config.json."
    )


def _notes(rope_set: RopeSet, parameters: dict[str, Any], trained: int, context: int) -> list[str]:
    """Return lines for the plan about one set of layers."""
    kind = rope.rope_type(parameters)
    frequencies, _ = rope.frequencies(parameters, rope_set.rotary_dim, trained, context)
    failure = first_failure(frequencies, context)
    before, after = rope_set.parameters["rope_theta"], parameters["rope_theta"]
    verdict = f"holds to {context:,}" if failure is None else f"fails the bound from distance {failure:,}"
    notes = [f"{rope_set.where}: {kind}, base {before:.6g} -> {after:.6g}; {verdict}"]
    if kind not in rope.EXACT_WHEN_SHORT:
        notes.append(f"static scaling: inputs of up to {trained:,} tokens change too")
    if kind == "dynamic":
        notes.append(
            f"dynamic scaling starts beyond max_position_embeddings, so that stays {trained:,}; keys that were "
            "cached before keep their old angles"
        )
    if kind == "longrope":
        notes.append(
            f"frequencies switch at {trained:,} tokens: keys cached before the switch keep their old angles"
        )
    return notes


def _write(
    config: dict[str, Any],
    architecture: Architecture,
    changed: dict[str | None, dict[str, Any]],
    trained: int,
    context: int,
) -> dict[str, Any]:
    """Return a copy of the config with new `rope_parameters` per layer type, in both spellings."""
    stock = architecture.stock_config(config)
    new = copy.deepcopy(config)
    text = architecture.text_config(new)
    parameters = copy.deepcopy(stock.rope_parameters)
    for layer_type, values in changed.items():
        if architecture.old_rope_scaling:
            values = _without_refused_keys(values, architecture)
        if layer_type is None:
            parameters = values
        else:
            parameters[layer_type] = values
        if rope.rope_type(values) == "linear" and layer_type is None:
            # Without it, the config does not show whether the factor is in max_position_embeddings already.
            text["original_max_position_embeddings"] = round(context / values["factor"])
        elif hasattr(stock, "original_max_position_embeddings"):
            text["original_max_position_embeddings"] = values.get("original_max_position_embeddings", context)
    text["rope_parameters"] = parameters
    dynamic = any(rope.rope_type(values) == "dynamic" for values in changed.values())
    text["max_position_embeddings"] = trained if dynamic else context
    spelled = both_rope_spellings({"model_type": architecture.model_type, **text})
    text.update({key: value for key, value in spelled.items() if key in text or key != "model_type"})
    return new


def _without_refused_keys(parameters: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Drop the keys that transformers 4 refuses in this type's `rope_scaling`, which transformers 5 reads first."""
    kind = rope.rope_type(parameters)
    legal = {*(architecture.old_rope_scaling or ()), "rope_type", "rope_theta", "partial_rotary_factor"}
    legal.add("original_max_position_embeddings")
    # The stock class derives these two of longrope by itself.
    derived = {"factor", "attention_factor"} if kind == "longrope" else set()
    if refused := set(parameters) - legal - derived:
        raise HeadwiseError(
            f"its rope_scaling has no room for {', '.join(sorted(refused))}.",
            "Choose ntk, base or longrope.",
        )
    return {key: value for key, value in parameters.items() if key in legal} if kind != "default" else parameters


def verify_frequencies(
    config: dict[str, Any], architecture: Architecture, context: int, tolerance: float = 1e-6
) -> float:
    """Compare the stock class's frequencies with those of `models/rope.py`, in both spellings and at both lengths.

    Args:
        config: a config.json in both spellings.
        architecture: its row.
        context: the longest input to try, for the rules that depend on the input's length.
        tolerance: largest relative difference, a few roundings of float32.

    Returns:
        The largest relative difference.

    Raises:
        HeadwiseError: the stock class refuses the config or computes other frequencies.
    """
    worst = 0.0
    rotary = rotary_class(architecture.stock_config(config))
    longest = architecture.stock_config(config).max_position_embeddings
    for spelling in ("rope_parameters", "rope_scaling"):
        read = copy.deepcopy(config)
        architecture.text_config(read).pop(spelling, None)
        stock = architecture.stock_config(read)
        for rope_set in rope_sets(config, architecture):
            for length in (longest, context):
                expected, scale = rope.frequencies(rope_set.parameters, rope_set.rotary_dim, longest, length)
                computed, computed_scale = stock_frequencies(rotary, stock, rope_set.layer_type, length)
                if computed.shape != expected.shape:
                    planes = f"{len(computed)} planes instead of {len(expected)}"
                    raise _disagreement(architecture, rope_set, planes)
                error = float(((computed - expected) / expected).abs().max())
                if error > tolerance or abs(computed_scale - scale) > tolerance:
                    raise _disagreement(architecture, rope_set, f"frequencies that differ by {error:.1e}")
                worst = max(worst, error)
    return worst


def _disagreement(architecture: Architecture, rope_set: RopeSet, difference: str) -> HeadwiseError:
    kind = rope.rope_type(rope_set.parameters)
    return HeadwiseError(f"for {kind} the stock {architecture.model_type} class has {difference}.")


def stock_frequencies(
    rotary: type[torch.nn.Module], stock: Any, layer_type: str | None, length: int
) -> tuple[torch.Tensor, float]:
    """Return the frequencies that the stock class computes for an input of `length` tokens.

    Args:
        rotary: the stock module of `rotary_class`.
        stock: the stock config object.
        layer_type: the key of the layers' `rope_parameters`; None if one set serves all layers.
        length: tokens of the input.

    Returns:
        (planes,) float64 radians per token, and the factor on cosines and sines.
    """
    module = rotary(copy.deepcopy(stock))
    run_rotary(module, length - 1, **({"layer_type": layer_type} if layer_type else {}))
    prefix = f"{layer_type}_" if layer_type else ""
    return getattr(module, f"{prefix}inv_freq").double(), float(getattr(module, f"{prefix}attention_scaling"))


def rotary_class(stock: Any) -> type[torch.nn.Module]:
    """Return the class of the stock module that computes rotary angles.

    Args:
        stock: the stock config object.
    """
    from transformers import AutoModel

    small = copy.deepcopy(stock)
    small.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModel.from_config(small)
    return next(
        type(module)
        for module in model.modules()
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    )
