"""Grouped-query decode in plain torch: the specification of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def gqa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence on everything cached before and with them.

    With S query tokens, token s of sequence b stands at position `lengths[b] - S + s` and sees the keys from
    `starts[b]` up to itself, of these only the last `window`. A token that sees no key gets zeros and a
    log-sum-exp of minus infinity. Cache entries that no token sees are never read into the result, whatever
    they hold.

    Args:
        q: (batch, S, heads, head_dim), S from 1 to 8.
        k, v: (batch, capacity, groups, head_dim and v_head_dim), the new tokens' entries included; with a block
            table (pages, page_size, groups, ...). Head h reads group `h // (heads // groups)`.
        scale: of the scores, 1 / sqrt(head_dim) when None.
        lengths: (batch) int32, tokens in the cache; None: capacity.
        starts: (batch) int32, first visible token (left padding); None: 0.
        block_table: (batch, max_pages) int32, the page of each run of page_size tokens.
        window: sliding window in tokens, the token itself counted.

    Returns:
        The output (batch, S, heads, v_head_dim) in the type of `q`, and the natural log-sum-exp of the scores
        (batch, S, heads), float32 (float64 for float64 inputs).
    """
    batch, tokens, heads, head_dim = q.shape
    if block_table is not None:
        k, v = (pages[block_table.long()].flatten(1, 2) for pages in (k, v))
    groups, capacity = k.shape[2], k.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    scale = head_dim**-0.5 if scale is None else scale
    if lengths is None:
        lengths = torch.full((batch,), capacity, device=q.device)
    first = torch.zeros_like(lengths) if starts is None else starts

    key = torch.arange(capacity, device=q.device)
    at = (lengths[:, None] - tokens + torch.arange(tokens, device=q.device))[..., None]
    seen = (key <= at) & (key >= first[:, None, None])
    if window is not None:
        seen &= key > at - window
    touched = seen.any(1)[:, :, None, None]
    k = torch.where(touched, k, 0).to(exact)
    v = torch.where(touched, v, 0).to(exact)

    grouped = q.to(exact).unflatten(2, (groups, heads // groups))
    scores = torch.einsum("bsgrd,btgd->bsgrt", grouped, k) * scale
    scores = scores.masked_fill(~seen[:, :, None, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    out = torch.einsum("bsgrt,btgd->bsgrd", weights, v)
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3)
