"""Decode on a grouped key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.kernels.dispatch import hopper_serves, refuse, requested, triton_serves
from headwise.kernels.gqa_decode import reference


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
    with_lse: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.gqa_decode` by the fastest means at hand.

    Args:
        with_lse: False lets torch's own attention serve (it keeps its log-sum-exp to itself; None is returned).
        backend: "auto", "triton", "sdpa" or "reference"; None: HEADWISE_KERNELS, else "auto".

    Raises:
        HeadwiseError: the backend asked for by name cannot serve these tensors.
    """
    name = requested(backend)
    served = triton_serves(q, q.shape[-1], 0, v.shape[-1])
    plain = q.shape[1] == 1 and lengths is None and starts is None and block_table is None and window is None
    where: dict[str, Any] = dict(lengths=lengths, starts=starts, block_table=block_table, window=window)
    if name == "triton" and not served:
        raise refuse("gqa_decode", name, "it needs CUDA tensors of half precision and widths in multiples of 16")
    if name == "sdpa" and backend and (with_lse or not plain):
        raise refuse("gqa_decode", name, "it serves one query token on a full contiguous cache, without LSE")
    # Measured: on Hopper our kernel is never behind torch's, elsewhere torch's is ahead where it can serve at all.
    if plain and not with_lse:
        torch_wins = name == "auto" and served and not hopper_serves(q, v.shape[-1])
        if name == "sdpa" or torch_wins:
            return _sdpa(q, k, v, scale), None
    if name != "reference" and served:
        from headwise.kernels.gqa_decode import triton

        return triton.gqa_decode(q, k, v, scale=scale, **where)
    return reference.gqa_decode(q, k, v, scale=scale, **where)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """One query token through torch: heads before tokens, as torch has them."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)
