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
    """Attend from the newest tokens of each sequence to its cache, their own entries included.

    With S query tokens, token s of sequence b has position `lengths[b] - S + s`. Its visible keys are those from
    `starts[b]` up to itself, of these the last `window`. A token without visible keys gets zeros and a log-sum-exp
    of minus infinity. Entries that are visible to no token do not change the result, even if they are NaN.

    Args:
        q: (batch, S, heads, head_dim), S from 1 to 8.
        k: (batch, capacity, groups, head_dim), the new tokens included; with a block table
            (pages, page_size, groups, head_dim). Head h reads group `h // (heads // groups)`.
        v: as `k`, v_head_dim numbers.
        scale: of the scores; None: 1 / sqrt(head_dim).
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
    position = (lengths[:, None] - tokens + torch.arange(tokens, device=q.device))[..., None]
    visible = (key <= position) & (key >= first[:, None, None])
    if window is not None:
        visible &= key > position - window
    used = visible.any(1)[:, :, None, None]
    k = torch.where(used, k, 0).to(exact)
    v = torch.where(used, v, 0).to(exact)

    grouped = q.to(exact).reshape(batch, tokens, groups, heads // groups, head_dim)
    scores = torch.einsum("bsgrd,btgd->bsgrt", grouped, k) * scale
    scores = scores.masked_fill(~visible[:, :, None, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None])
    out = torch.einsum("bsgrt,btgd->bsgrd", weights, v)
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3)
