"""The exact MLA form of a layer, and its shape: mathematics, section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.models.layout import AttentionLayout, LatentWeights, LayerWeights


def latent_layout(source: AttentionLayout, rank: int, rope_dim: int) -> AttentionLayout:
    """Return the MLA layout with the source's heads: position-free width `head_dim`, rotary width `rope_dim`.

    Args:
        source: the layout of a source layer; that of an MLA layer is returned as it is.
        rank: of the latent (`kv_lora_rank`).
        rope_dim: width of the shared rotary key (`qk_rope_head_dim`).
    """
    if source.kv_lora_rank is not None:
        return source
    return AttentionLayout(
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_attention_heads,
        head_dim=source.head_dim + rope_dim,
        v_head_dim=source.v_head_dim,
        rotary_dim=rope_dim,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope_dim,
    )


def exact_mla_shape(layout: AttentionLayout) -> tuple[int, int]:
    """Return the rank and rotary width with which `exact_mla` holds a layer.

    The rotary key holds every plane of every KV head, the latent holds the rest. MLA has its own shape.

    Args:
        layout: the layout of a source layer.
    """
    if layout.kv_lora_rank is not None:
        return layout.kv_lora_rank, layout.rotary_dim
    position_free = layout.head_dim - layout.rotary_dim
    groups = layout.num_key_value_heads
    return groups * (position_free + layout.v_head_dim), groups * layout.rotary_dim


def exact_mla(
    weights: LayerWeights,
    frequencies: Tensor,
    *,
    scale: float,
    rank: int | None = None,
    rope_dim: int | None = None,
) -> LatentWeights:
    """Return the same function as an MLA layer, exactly (mathematics, section 3).

    All rotary planes of the G KV heads become rotary dimensions that every query head shares; query head h is zero
    outside the block of its own KV head. The latent holds the values and, with partial rotary embeddings or none,
    the position-free key rows. The cache holds as many elements as before.

    Args:
        weights: a layer without query-key norms, float64.
        frequencies: (F,) radians per token of the model's rotary planes.
        scale: the factor on the source's scores.
        rank: a larger rank to fill with zeros, so that layers with and without RoPE (SmolLM3) share one shape;
            None: that of `exact_mla_shape`.
        rope_dim: the same for the rotary width.

    Raises:
        ValueError: the shape is too small.
    """
    layout = weights.layout
    heads, groups, rotary = layout.num_attention_heads, layout.num_key_value_heads, layout.rotary_dim
    own_rank, own_rope = exact_mla_shape(layout)
    rank, rope_dim = rank or own_rank, rope_dim or own_rope
    if rank < own_rank or rope_dim < own_rope:
        raise ValueError(f"the exact MLA form needs a shape of {own_rank} + {own_rope}, not {rank} + {rope_dim}")

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


def _fill(frequencies: Tensor, num_planes: int) -> Tensor:
    """Return the first `num_planes` frequencies, the last one repeated where there are fewer."""
    missing = num_planes - len(frequencies)
    return torch.cat([frequencies, frequencies[-1:].repeat(max(missing, 0))])[:num_planes]
