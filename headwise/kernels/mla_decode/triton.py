"""Absorbed MLA decode with the decode kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels.decode.attend import attend


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    *,
    scale: float,
    latent_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.mla_decode` with the kernel; rank and rotary width are multiples of 16.

    Selected tokens are pages of one token: each query token is a sequence of its own, and its indices are its block
    table.
    """
    rows = q_latent.shape[:2]
    if indices is not None:
        lengths, block_table = selected_pages(indices, latent.shape[1], lengths, starts)
        starts, q_latent, q_rope = None, q_latent.flatten(0, 1)[:, None], q_rope.flatten(0, 1)[:, None]
        latent, k_rope = latent.flatten(0, 1)[:, None], k_rope.flatten(0, 1)[:, None]
        latent_scale = None if latent_scale is None else latent_scale.flatten(0, 1)[:, None]
    latent, k_rope = latent[..., None, :], k_rope[..., None, :]
    result: tuple[Tensor, Tensor] = attend(
        q_latent, q_rope, latent, k_rope, None, scale, lengths, starts, block_table, window, latent_scale
    )
    if indices is not None:
        return result[0].view(*rows, *result[0].shape[2:]), result[1].view(*rows, -1)
    return result


def selected_pages(
    indices: Tensor, capacity: int, lengths: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the lengths and the block table of query tokens as sequences, whose pages are tokens of the cache.

    Args:
        indices: (batch, S, count), as in `mla_decode`.
        capacity: tokens in the cache of a sequence.
        lengths: (batch) tokens in the cache; None: capacity.
        starts: (batch) first visible token; None: 0.

    Returns:
        (batch S) and (batch S, count), int32.
    """
    batch, tokens, count = indices.shape
    first = torch.arange(batch, dtype=torch.int32, device=indices.device)[:, None, None] * capacity
    visible = torch.full((batch,), capacity, device=indices.device) if lengths is None else lengths
    visible = visible if starts is None else visible - starts
    own = visible[:, None] - tokens + 1 + torch.arange(tokens, device=visible.device)
    return own.clamp(0, count).flatten().int(), (indices + first).flatten(0, 1).int()
