"""From any number of key-value heads to one latent and one shared rotary key: MHA/GQA/MQA -> MLA.

Pure linear algebra on one layer, in float64 (mathematics, sections 3 and 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.convert.mla.alternating import Features, Layer, Statistics, alternate, conjugate_pairs
from headwise.convert.mla.components import partial_rope, seed, transmla
from headwise.models.layout import AttentionLayout, LatentWeights, LayerWeights, rows

METHODS = ("optimal", "transmla", "partial-rope")
# Alternations after which the expected error falls by less than a hundredth a step on the models measured.
ITERATIONS = 10
# Without calibration: how far attention is taken to look, and with which weight.
UNKNOWN_LENGTH = 1024
# The same for how many tokens a query reads.
UNKNOWN_READ = 2


@dataclass(frozen=True)
class LatentReport:
    """What converting a layer is expected to cost: squared error of its output relative to the output's energy.

    `key_error` counts what wrong attention scores do and `value_error` what wrong values do. `folding` is how
    many neighbouring frequencies were taken as one at the start; `errors` the total after each alternation.
    """

    method: str
    folding: int
    key_error: float
    value_error: float
    errors: tuple[float, ...] = ()


def convert(
    weights: LayerWeights,
    frequencies: Tensor,
    *,
    rank: int,
    rope_frequencies: Tensor,
    scale: float,
    method: str = "optimal",
    moment: Tensor | None = None,
    key_moment: Tensor | None = None,
    value_moment: Tensor | None = None,
    distances: Tensor | None = None,
    foldings: Sequence[int] = (1, 2, 4),
    iterations: int = ITERATIONS,
) -> tuple[LatentWeights, LatentReport]:
    """A layer as MLA with a latent of `rank` and a rotary key of `2 * len(rope_frequencies)` numbers.

    Args:
        weights: a layer without q/k norms, float64, on the device that all other tensors are on, and the result.
        frequencies: (F,) radians per token of the source's rotary planes.
        rope_frequencies: (P / 2,) of the MLA model's: `deepseek.default_grid`, or `free_frequencies`.
        scale: what the source multiplies scores by.
        method: one of `METHODS`.
        moment, key_moment, value_moment: (D + 1, D + 1) as in `alternate.Statistics`. Without the first,
            inputs are taken to be uncorrelated; without the others, attention to fall on tokens evenly.
        distances: (H, length) attention weight by distance; default: 1 / (1 + distance).
        foldings: numbers of neighbouring frequencies to try as one; the least expected error is taken.
        iterations: alternations of least squares (method "optimal" only).
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: {', '.join(METHODS)}")
    biased = weights.has_bias
    weights = weights if biased else with_constant(weights)
    known = statistics(weights, moment, key_moment, value_moment, distances)
    layer = Layer(weights, frequencies, known, scale)
    total = sum(layer.energies) or 1.0
    # More numbers than there are inputs would be linearly dependent, and reading them would amplify rounding.
    own_rank = min(rank, weights.q.shape[2] if biased else weights.q.shape[2] - 1)
    source = (weights, frequencies, rope_frequencies, own_rank, known)
    half = weights.layout.rotary_dim // 2
    tried = [f for f in foldings if f <= half] or [1]

    errors: list[float] = []
    if method == "optimal":
        starts = [(folding, seed(*source, folding)) for folding in tried]
        folding, features = min(starts, key=lambda start: sum(layer.read(start[1]).errors))
        features, readings, errors = alternate(layer, features, iterations)
    elif method == "transmla":
        baselines = [(folding, *transmla(*source, folding)) for folding in tried]
        scored = [(f, x, layer.read(x, keys, values)) for f, x, keys, values in baselines]
        folding, features, readings = min(scored, key=lambda entry: sum(entry[2].errors))
    else:
        features, keys, values = partial_rope(*source)
        folding, readings = 1, layer.read(features, keys, values)

    latent = _widen(_assemble(weights, features, readings.keys, readings.values, known, scale), rank)
    key_error, value_error = (error / total for error in readings.errors)
    report = LatentReport(method, folding, key_error, value_error, tuple(errors))
    return (latent if biased else _without_constant(latent)), report


def statistics(
    weights: LayerWeights,
    moment: Tensor | None = None,
    key_moment: Tensor | None = None,
    value_moment: Tensor | None = None,
    distances: Tensor | None = None,
) -> Statistics:
    """What is known of a layer, what is not replaced by the neutral choice (see `convert`)."""
    device = weights.q.device
    inputs = (torch.eye(weights.hidden_size + 1, device=device) if moment is None else moment).double()
    if distances is None:
        guess = 1 / torch.arange(1, UNKNOWN_LENGTH + 1, device=device).double()
        distances = (guess / guess.sum()).expand(weights.layout.num_attention_heads, -1)
    keys = inputs if key_moment is None else key_moment.double()
    # A query that reads k independent tokens evenly: the spread of their mean is 1 / k of theirs.
    constant = torch.outer(keys[-1], keys[-1])
    guessed = constant + (keys - constant) / UNKNOWN_READ
    values = guessed if value_moment is None else value_moment.double()
    return Statistics(inputs, keys, values, distances.double())


def with_constant(weights: LayerWeights) -> LayerWeights:
    """A layer without biases as one whose biases are zero."""

    def pad(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 1))

    return replace(weights, q=pad(weights.q), k=pad(weights.k), v=pad(weights.v))


def _without_constant(latent: LatentWeights) -> LatentWeights:
    names = ("q_nope", "q_rope", "kv_down", "k_rope")
    return replace(latent, **{name: getattr(latent, name)[..., :-1] for name in names})


def _assemble(
    weights: LayerWeights, features: Features, keys: Tensor, values: Tensor, known: Statistics, scale: float
) -> LatentWeights:
    """The layer that caches these features and reads them so.

    Position-free queries are the source's own: the expected key rows sit in the up-projection. The latent is
    given the basis in which its numbers are uncorrelated, of unit size and ordered by what they bring: any
    other would lose digits in bfloat16.
    """
    layout, rank = weights.layout, len(features.latent)
    rotary, half, count = layout.rotary_dim, layout.rotary_dim // 2, len(features.frequencies)
    queries = conjugate_pairs(weights.q, rotary)
    q_rope = keys[:, :, :count].mH @ queries
    of_latent = keys[:, :, 2 * count :]
    k_up = torch.cat([rows(of_latent[:, :half]), of_latent[:, rotary:].real / 2**0.5], 1)
    v_up = values.repeat_interleave(layout.queries_per_group, 0)

    energy, vectors = torch.linalg.eigh(features.latent @ known.inputs @ features.latent.T)
    kept = energy > 1e-12 * energy[-1]
    size = torch.where(kept, energy, 1.0).sqrt()
    down = (vectors / size * kept).T @ features.latent
    up = torch.cat([k_up, v_up], 1) @ (vectors * size * kept)
    basis = torch.linalg.eigh(torch.einsum("har,has->rs", up, up))[1].flip(1)
    up = up @ basis
    return LatentWeights(
        layout=latent_layout(layout, rank, 2 * count),
        q_nope=weights.q,
        q_rope=rows(q_rope),
        kv_down=basis.T @ down,
        k_rope=rows(features.turning),
        k_up=up[:, : layout.head_dim],
        v_up=up[:, layout.head_dim :],
        o=weights.o,
        frequencies=features.frequencies,
        scale=scale,
    )


def _widen(latent: LatentWeights, rank: int) -> LatentWeights:
    """Fill the latent with zeros up to `rank`."""
    missing = rank - latent.kv_down.shape[0]
    pad = torch.nn.functional.pad
    return replace(
        latent,
        layout=replace(latent.layout, kv_lora_rank=rank),
        kv_down=pad(latent.kv_down, (0, 0, 0, missing)),
        k_up=pad(latent.k_up, (0, missing)),
        v_up=pad(latent.v_up, (0, missing)),
    )


def latent_layout(source: AttentionLayout, rank: int, rope_dim: int) -> AttentionLayout:
    """The MLA layout with the source's heads: position-free width `head_dim`, rotary width `rope_dim`."""
    return AttentionLayout(
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_attention_heads,
        head_dim=source.head_dim + rope_dim,
        v_head_dim=source.v_head_dim,
        rotary_dim=rope_dim,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope_dim,
    )


def lift_shape(layout: AttentionLayout) -> tuple[int, int]:
    """(rank, rope_dim) with which `lift` holds a layer: every key plane turns, the rest is latent."""
    position_free = layout.head_dim - layout.rotary_dim
    groups = layout.num_key_value_heads
    return groups * (position_free + layout.v_head_dim), groups * layout.rotary_dim


def lift(
    weights: LayerWeights,
    frequencies: Tensor,
    *,
    scale: float,
    rank: int | None = None,
    rope_dim: int | None = None,
) -> LatentWeights:
    """The same function as an MLA layer, exactly (mathematics, section 3).

    All rotary planes of the G KV heads become rotary dims that every query head sees, and query head h is zero
    outside its own KV head's block; the latent holds the values and, with partial rotary embeddings or none,
    the position-free key rows. The cache holds as many numbers as before.

    Args:
        weights: a layer without q/k norms.
        frequencies: (F,) radians per token of the model's rotary planes.
        scale: what the source multiplies scores by.
        rank, rope_dim: a larger shape to fill with zeros, so that layers with and without RoPE (SmolLM3)
            share one; default `lift_shape`.
    """
    layout = weights.layout
    heads, groups, rotary = layout.num_attention_heads, layout.num_key_value_heads, layout.rotary_dim
    own_rank, own_rope = lift_shape(layout)
    rank, rope_dim = rank or own_rank, rope_dim or own_rope
    if rank < own_rank or rope_dim < own_rope:
        raise ValueError(f"an exact lift needs {own_rank} + {own_rope}, not {rank} + {rope_dim}")

    inputs, half, free = weights.q.shape[2], rotary // 2, layout.head_dim - rotary
    new = weights.q.new_zeros

    # Rotary rows, half-split over all planes: plane g * half + f is plane f of KV head g.
    q_rope, k_rope = new(heads, 2, rope_dim // 2, inputs), new(2, rope_dim // 2, inputs)
    key_planes = weights.k[:, :rotary].reshape(groups, 2, half, inputs)
    query_planes = weights.q[:, :rotary].reshape(heads, 2, half, inputs)
    k_rope[:, : groups * half] = key_planes.transpose(0, 1).reshape(2, groups * half, inputs)
    for h in range(heads):
        start = h // layout.queries_per_group * half
        q_rope[h, :, start : start + half] = query_planes[h]

    q_nope, kv_down = new(heads, layout.head_dim, inputs), new(rank, inputs)
    k_up, v_up = new(heads, layout.head_dim, rank), new(heads, layout.v_head_dim, rank)
    q_nope[:, :free] = weights.q[:, rotary:]
    kv_down[: groups * free] = weights.k[:, rotary:].flatten(0, 1)
    kv_down[groups * free : own_rank] = weights.v.flatten(0, 1)
    for h in range(heads):
        group = h // layout.queries_per_group
        key, value = group * free, groups * free + group * layout.v_head_dim
        k_up[h, :free, key : key + free].diagonal().fill_(1)
        v_up[h, :, value : value + layout.v_head_dim].diagonal().fill_(1)

    return LatentWeights(
        layout=latent_layout(layout, rank, rope_dim),
        q_nope=q_nope,
        q_rope=q_rope.flatten(1, 2),
        kv_down=kv_down,
        k_rope=k_rope.flatten(0, 1),
        k_up=k_up,
        v_up=v_up,
        o=weights.o,
        frequencies=_fill(frequencies.repeat(rope_dim // (2 * len(frequencies)) or 1), rope_dim // 2),
        scale=scale,
    )


def _fill(frequencies: Tensor, planes: int) -> Tensor:
    """The first `planes` of the frequencies, the last one repeated where there are fewer."""
    missing = planes - len(frequencies)
    return torch.cat([frequencies, frequencies[-1:].repeat(max(missing, 0))])[:planes]
