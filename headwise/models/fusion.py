"""Rearrange the query, key and value rows of checkpoints into the order of `LayerWeights`, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.models.layout import AttentionLayout


def half_split_order(layout: AttentionLayout, rotary_layout: str) -> Tensor:
    """Return the source row of each row of `LayerWeights`.

    Args:
        layout: layout of the layer.
        rotary_layout: order of the rotary rows in the checkpoint, "half" or "interleaved".
    """
    order = torch.arange(layout.head_dim)
    if rotary_layout == "interleaved":
        rotary = order[: layout.rotary_dim]
        order = torch.cat([rotary[0::2], rotary[1::2], order[layout.rotary_dim :]])
    return order


def reorder(rows: Tensor, order: Tensor) -> Tensor:
    """Return `rows[:, order]`, without a copy if the order is unchanged, because layers are large.

    Args:
        rows: (heads, head_dim, ...) the rows of each head.
        order: (head_dim,) the source row of each row.
    """
    return rows if bool((order[1:] > order[:-1]).all()) else rows[:, order]


def read_projection(tensors: Mapping[str, Tensor], name: str, biased: bool) -> Tensor:
    """Return a projection in float64, (rows, inputs), with the bias as the last column.

    Args:
        tensors: of the checkpoint.
        name: of the module, with its dot.
        biased: whether the module has a bias.
    """
    weight = tensors[f"{name}weight"].to(torch.float64)
    if not biased:
        return weight
    return torch.cat([weight, tensors[f"{name}bias"].to(torch.float64)[:, None]], dim=1)


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not those of a config.

    Args:
        tensors: of a layer, by name.
        shapes: that the config implies, by name.

    Raises:
        HeadwiseError: a tensor is missing, or has another shape.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise HeadwiseError(
                f"tensor {name} is missing; by config.json its shape is {shape}.",
                "The checkpoint and its config.json do not belong together, or a shard is incomplete.",
            )
        if tuple(tensors[name].shape) != shape:
            raise HeadwiseError(
                f"tensor {name} has shape {tuple(tensors[name].shape)}; by config.json it is {shape}.",
                "The checkpoint and its config.json do not belong together.",
            )


def split_gate(parts: dict[str, Tensor], layout: AttentionLayout) -> Tensor:
    """Take the rows of the output gates out of a query projection: every head has its queries, then its gate.

    Args:
        parts: projection matrices; that of "q" is replaced by its queries.
        layout: layout of the layer.

    Returns:
        The gates, (heads, head_dim, inputs).
    """
    halves: Tensor = parts["q"].unflatten(0, (layout.num_attention_heads, 2, layout.head_dim))
    parts["q"] = halves[:, 0].flatten(0, 1)
    return halves[:, 1]


def present(tensor: Tensor | None, layer: int, what: str) -> Tensor:
    """Return a tensor that the stock class has a place for.

    Args:
        tensor: of the weights.
        layer: index of the decoder layer.
        what: the tensor holds, in words.

    Raises:
        ValueError: the weights do not have it.
    """
    if tensor is None:
        raise ValueError(f"layer {layer} has {what}, and the weights have none")
    return tensor


def split(fusion: str, parts: dict[str, Tensor], layout: AttentionLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Split projection matrices (rows, inputs) into queries, keys and values, (heads, head_dim, inputs) each.

    Args:
        fusion: the `fusion` of the architecture row.
        parts: projection matrices by "q", "k", "v", or "qkv" if they are fused.
        layout: layout of the layer.

    Returns:
        Queries, keys and values.
    """
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
    """Build projection matrices (rows, inputs) from queries, keys and values; the inverse of `split`.

    Args:
        fusion: the `fusion` of the architecture row.
        rows: (heads, head_dim, inputs) matrices by "q", "k" and "v".
        layout: layout of the layer.

    Returns:
        Projection matrices by "q", "k", "v", or "qkv" if they are fused.
    """
    q, k, v = rows["q"], rows["k"], rows["v"]
    if fusion == "qkv_per_group_interleaved":
        queries = q.unflatten(0, (layout.num_key_value_heads, -1))
        return {"qkv": torch.cat([queries, k[:, None], v[:, None]], dim=1).flatten(0, 2)}
    if fusion == "qkv_concat":
        return {"qkv": torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])}
    return {part: tensor.flatten(0, 1) for part, tensor in rows.items()}


def fit_bias(tensor: Tensor, width: int, biased: bool) -> Tensor:
    """Add a zero bias column, or drop one, so that the stock class can hold the matrix.

    Args:
        tensor: (heads, head_dim, width or width + 1).
        width: width of the residual stream.
        biased: whether the stock class has a bias.

    Returns:
        (heads, head_dim, width + 1) if `biased`, else (heads, head_dim, width).

    Raises:
        ValueError: the weights have a bias, and the stock class has none.
    """
    column = tensor[..., width:]
    if biased:
        return tensor if column.shape[-1] else torch.cat([tensor, torch.zeros_like(tensor[..., :1])], dim=-1)
    if column.any():
        raise ValueError("the weights have a bias, and the stock class has no room for it")
    return tensor[..., :width]


def read_norm(weight: Tensor, heads: int, scope: str, offset: float) -> Tensor:
    """Return what an RMSNorm on queries or keys multiplies by, (heads, head_dim) in float64.

    Args:
        weight: of the norm, (head_dim,) or (heads * head_dim,).
        heads: number of heads.
        scope: "head" for one weight that all heads share, "all" for a weight of all heads.
        offset: added to the weight.
    """
    weight = weight.to(torch.float64)
    if offset:
        weight = weight + offset
    return weight.expand(heads, -1) if scope == "head" else weight.unflatten(0, (heads, -1))


def stored_norm(norm: Tensor, scope: str, where: str) -> Tensor:
    """Return the rows of a norm that the stock class stores: one that all heads share, or those of all heads.

    Args:
        norm: (heads, head_dim).
        scope: as in `read_norm`.
        where: begins the message.

    Raises:
        ValueError: heads share a weight, and theirs differ.
    """
    if scope == "head" and (norm != norm[:1]).logical_and(~norm.isnan()).any():
        raise ValueError(f"{where}, and these differ")
    return norm[:1] if scope == "head" else norm
