"""A longer context for a model: its config with rescaled positions, checked against the stock class."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from headwise.convert.positions import rope_bound as bound
from headwise.errors import HeadwiseError
from headwise.models import rope
from headwise.models.architecture import Architecture, both_rope_spellings


@dataclass(frozen=True)
class Rotation:
    """The layers of a model that share one set of frequencies.

    Attributes:
        layer_type: the key of their `rope_parameters`; None where one set serves all layers.
        parameters: transformers 5 `rope_parameters`, defaults filled in by the stock class.
        rotary_dim: numbers of a head that turn.
        window: the farthest any of these layers looks; None where one of them looks at everything.
    """

    layer_type: str | None
    parameters: dict[str, Any]
    rotary_dim: int
    window: int | None

    @property
    def where(self) -> str:
        return f"{self.layer_type} layers" if self.layer_type else "all layers"


def rotations(config: dict[str, Any], architecture: Architecture) -> list[Rotation]:
    """The sets of frequencies of a model, one per layer type where the stock class keeps several.

    Raises:
        HeadwiseError: no layer has RoPE.
    """
    stock = architecture.stock_config(config)
    layouts = architecture.layouts(config)
    if not any(layout.rotary_dim for layout in layouts):
        raise HeadwiseError(
            f"{architecture.model_type} does not rotate its positions, so there is no RoPE to rescale.",
            "Leave out --context; a longer context for this model needs training from its own recipe.",
        )
    parameters = stock.rope_parameters
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    kinds = getattr(stock, "layer_types", None) or [None] * len(layouts)
    found = []
    for key, own in (nested or {None: parameters}).items():
        turning = [a for a, kind in zip(layouts, kinds, strict=True) if a.rotary_dim and key in (None, kind)]
        if not turning:
            continue
        windows = [layout.sliding_window for layout in turning]
        window = None if None in windows else max(w for w in windows if w is not None)
        found.append(Rotation(key, dict(own), turning[0].rotary_dim, window))
    return found


def extend(
    config: dict[str, Any],
    architecture: Architecture,
    *,
    context: int,
    rule: str = "auto",
    rope_theta: float | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Rewrite how positions rotate.

    Layers that look no farther than the present context keep their frequencies where the stock class keeps them
    apart (Gemma 3's sliding layers).

    Args:
        config: the source's config.json.
        architecture: its row.
        context: tokens wanted.
        rule: one of `rope.RULES`, or "auto".
        rope_theta: the new base; makes the rule `base`.

    Returns:
        A new config in both spellings, checked against the stock class, and what to tell the user.

    Raises:
        HeadwiseError: the request makes no sense for this model, or its stock class cannot express it.
    """
    if rope_theta is not None and rule == "auto":
        rule = "base"
    if rule not in ("auto", *rope.RULES):
        raise HeadwiseError(f"--rope {rule} is not a rule.", f"Choose from auto, {', '.join(rope.RULES)}.")
    if (rope_theta is not None) != (rule == "base"):
        raise HeadwiseError(
            "--rope base needs the new base." if rule == "base" else f"--rope-theta says nothing to --rope {rule}.",
            "Give both: --rope base --rope-theta 1000000.",
        )
    sets = rotations(config, architecture)
    trained = architecture.stock_config(config).max_position_embeddings
    if context <= trained:
        raise HeadwiseError(
            f"--context {context} is not larger than the present max_position_embeddings: {trained}.",
            f"Ask for more than {trained} tokens, or leave out --context.",
        )
    stretched = [r for r in sets if r.window is None or r.window > trained]
    if not stretched and rule != "auto":
        stretched = sets
    changed: dict[str | None, dict[str, Any]] = {}
    notes = [
        f"{r.where} see at most {r.window:,} tokens: their frequencies stay" for r in sets if r not in stretched
    ]
    for rotation in stretched:
        chosen = rule
        asked = {"rotary_dim": rotation.rotary_dim, "trained": trained, "context": context}
        try:
            if rule == "auto":
                advice = bound.recommend(rotation.parameters, rotary_dim=rotation.rotary_dim, trained=trained)
                chosen = advice.rule
                notes.append(f"auto chose {chosen} for {rotation.where}: {advice.reason}")
            new_rope = rope.rescale(rotation.parameters, chosen, **asked, rope_theta=rope_theta)
        except ValueError as error:
            raise HeadwiseError(f"--rope {chosen} cannot extend this model: {error}.") from error
        changed[rotation.layer_type] = new_rope
        notes += _notes(rotation, new_rope, trained, context)
    try:
        new = _write(config, architecture, changed, trained, context)
        verify_frequencies(new, architecture, context)
    except HeadwiseError as error:
        kinds = " and ".join(sorted({rope.rope_type(own) for own in changed.values()}))
        raise HeadwiseError(
            f"{architecture.model_type} cannot express {kinds} scaling: {error.message}",
            error.hint or "Choose another --rope; ntk needs nothing but rope_theta.",
        ) from error
    return new, notes


def _notes(rotation: Rotation, parameters: dict[str, Any], trained: int, context: int) -> list[str]:
    kind = rope.rope_type(parameters)
    turning, _ = rope.frequencies(parameters, rotation.rotary_dim, trained, context)
    failure = bound.first_failure(turning, context)
    before, after = rotation.parameters["rope_theta"], parameters["rope_theta"]
    verdict = f"holds to {context:,}" if failure is None else f"fails the bound from distance {failure:,}"
    notes = [f"{rotation.where}: {kind}, base {before:.6g} -> {after:.6g}; {verdict}"]
    if kind not in rope.EXACT_WHEN_SHORT:
        notes.append(f"static scaling: inputs of up to {trained:,} tokens change too")
    if kind == "dynamic":
        notes.append(
            f"dynamic scaling stretches beyond max_position_embeddings, so that stays {trained:,}; keys cached "
            "before a stretch keep their old angles"
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
    stock = architecture.stock_config(config)
    new = copy.deepcopy(config)
    text = architecture.text_config(new)
    parameters = copy.deepcopy(stock.rope_parameters)
    for layer_type, own in changed.items():
        if architecture.old_rope_scaling:
            own = _strict(own, architecture)
        if layer_type is None:
            parameters = own
        else:
            parameters[layer_type] = own
        if hasattr(stock, "original_max_position_embeddings"):
            text["original_max_position_embeddings"] = own.get("original_max_position_embeddings", context)
    text["rope_parameters"] = parameters
    dynamic = any(rope.rope_type(own) == "dynamic" for own in changed.values())
    text["max_position_embeddings"] = trained if dynamic else context
    spelled = both_rope_spellings({"model_type": architecture.model_type, **text})
    text.update({key: value for key, value in spelled.items() if key in text or key != "model_type"})
    return new


def _strict(parameters: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Without what transformers 4 refuses in this type's `rope_scaling`, which transformers 5 reads first."""
    kind = rope.rope_type(parameters)
    room = {*(architecture.old_rope_scaling or ()), "rope_type", "rope_theta", "partial_rotary_factor"}
    room.add("original_max_position_embeddings")
    # The stock class derives these two of longrope by itself.
    derived = {"factor", "attention_factor"} if kind == "longrope" else set()
    if lost := set(parameters) - room - derived:
        raise HeadwiseError(
            f"its rope_scaling has no room for {', '.join(sorted(lost))}.",
            "Choose ntk, base or longrope.",
        )
    return {key: value for key, value in parameters.items() if key in room} if kind != "default" else parameters


def verify_frequencies(
    config: dict[str, Any], architecture: Architecture, context: int, tolerance: float = 1e-6
) -> float:
    """Compare the stock class's frequencies with the pure functions', in both spellings and at both lengths.

    Args:
        config: a config.json in both spellings.
        architecture: its row.
        context: the longest input to try, for the rules that look at the input's length.
        tolerance: largest relative difference, a few roundings of float32.

    Returns:
        The largest relative difference found.

    Raises:
        HeadwiseError: the stock class refuses the config or turns by other frequencies.
    """
    worst = 0.0
    rotary = rotary_class(architecture.stock_config(config))
    longest = architecture.stock_config(config).max_position_embeddings
    for spelling in ("rope_parameters", "rope_scaling"):
        read = copy.deepcopy(config)
        architecture.text_config(read).pop(spelling, None)
        stock = architecture.stock_config(read)
        for rotation in rotations(config, architecture):
            for length in (longest, context):
                expected, scale = rope.frequencies(rotation.parameters, rotation.rotary_dim, longest, length)
                found, found_scale = stock_frequencies(rotary, stock, rotation.layer_type, length)
                if found.shape != expected.shape:
                    raise _disagree(architecture, rotation, f"{len(found)} planes instead of {len(expected)}")
                error = float(((found - expected) / expected).abs().max())
                if error > tolerance or abs(found_scale - scale) > tolerance:
                    raise _disagree(architecture, rotation, f"frequencies that differ by {error:.1e}")
                worst = max(worst, error)
    return worst


def _disagree(architecture: Architecture, rotation: Rotation, what: str) -> HeadwiseError:
    return HeadwiseError(
        f"for {rope.rope_type(rotation.parameters)} the stock {architecture.model_type} class has {what}."
    )


def stock_frequencies(
    rotary: type[torch.nn.Module], stock: Any, layer_type: str | None, length: int
) -> tuple[torch.Tensor, float]:
    """What the stock class turns by when it reads an input of `length` tokens.

    Returns:
        (planes,) float64 and the factor on cosines and sines.
    """
    module = rotary(copy.deepcopy(stock))
    module(torch.zeros(1), torch.tensor([[length - 1]]), **({"layer_type": layer_type} if layer_type else {}))
    prefix = f"{layer_type}_" if layer_type else ""
    return getattr(module, f"{prefix}inv_freq").double(), float(getattr(module, f"{prefix}attention_scaling"))


def rotary_class(stock: Any) -> type[torch.nn.Module]:
    """The stock module that turns positions into angles."""
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
