"""Grouped-query decode with the decode kernel."""

from __future__ import annotations

from torch import Tensor

from headwise.kernels.decode.attend import attend


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
    """Compute `reference.gqa_decode` with the kernel; head dims are multiples of 16."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result: tuple[Tensor, Tensor] = attend(q, None, k, None, v, scale, lengths, starts, block_table, window)
    return result
