"""How checkpoints lay the rows of queries, keys and values, and how `LayerWeights` does: pure rearrangements."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.models.layout import AttentionLayout


def half_split_order(layout: AttentionLayout, rotary_layout: str) -> Tensor:
    """The source row of each row of `LayerWeights`."""
    order = torch.arange(layout.head_dim)
    if rotary_layout == "interleaved":
        rotary = order[: layout.rotary_dim]
        order = torch.cat([rotary[0::2], rotary[1::2], order[layout.rotary_dim :]])
    return order


def reorder(rows: Tensor, order: Tensor) -> Tensor:
    """`rows[:, order]`, without a copy where nothing moves: layers are large and memory is slow."""
    return rows if bool((order[1:] > order[:-1]).all()) else rows[:, order]


def split(fusion: str, parts: dict[str, Tensor], layout: AttentionLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Projection matrices (rows, inputs) -> q, k, v (heads, head_dim, inputs)."""
    heads, groups, dim = layout.num_attention_heads, layout.num_key_value_heads, layout.head_dim
    if fusion == "qkv_per_group_interleaved":
        grouped = parts["qkv"].unflatten(0, (groups, heads // groups + 2, dim))
        return grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]
    if fusion == "qkv_concat":
        sizes = [heads * dim, groups * dim, groups * layout.v_head_dim]
        q, k, v = parts["qkv"].split(sizes)
    else:
        q, k, v = parts["q"], parts["k"], parts["v"]
    return q.unflatten(0, (heads, dim)), k.unflatten(0, (groups, dim)), v.unflatten(0, (groups, layout.v_head_dim))


def fuse(fusion: str, rows: dict[str, Tensor], layout: AttentionLayout) -> dict[str, Tensor]:
    """The inverse of `split`."""
    q, k, v = rows["q"], rows["k"], rows["v"]
    if fusion == "qkv_per_group_interleaved":
        queries = q.unflatten(0, (layout.num_key_value_heads, -1))
        return {"qkv": torch.cat([queries, k[:, None], v[:, None]], dim=1).flatten(0, 2)}
    if fusion == "qkv_concat":
        return {"qkv": torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])}
    return {part: tensor.flatten(0, 1) for part, tensor in rows.items()}


def fit_bias(tensor: Tensor, width: int, biased: bool) -> Tensor:
    """(heads, head_dim, width + 1 where `biased`): a zero column is added or dropped."""
    column = tensor[..., width:]
    if biased:
        return tensor if column.shape[-1] else torch.cat([tensor, torch.zeros_like(tensor[..., :1])], dim=-1)
    if column.any():
        raise ValueError("the weights have a bias, and the stock class has no room for it")
    return tensor[..., :width]
