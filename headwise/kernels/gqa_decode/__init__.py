"""Decode on a grouped key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.kernels.dispatch import backend_error, choose_backend, supports_triton, uses_hopper_kernel
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
    """Attend from the newest tokens of each sequence to a grouped cache, on the fastest backend.

    `headwise.kernels.gqa_decode.reference` is the specification.

    Args:
        q: (batch, S, heads, head_dim), S from 1 to 8.
        k: (batch, capacity, groups, head_dim), the new tokens included; with a block table
            (pages, page_size, groups, head_dim).
        v: as `k`, v_head_dim numbers.
        scale: of the scores; None: 1 / sqrt(head_dim).
        lengths: (batch) int32, tokens in the cache; None: capacity.
        starts: (batch) int32, first visible token (left padding); None: 0.
        block_table: (batch, max_pages) int32, the page of each run of page_size tokens.
        window: sliding window in tokens, the token itself counted.
        with_lse: whether the log-sum-exp is needed. torch's own attention does not return it, so that False allows
            torch's attention.
        backend: "auto", "triton", "sdpa" or "reference"; None: HEADWISE_KERNELS, else "auto".

    Returns:
        The output (batch, S, heads, v_head_dim) in the type of `q`, and the natural log-sum-exp of the scores
        (batch, S, heads); None for it if torch's attention ran.

    Raises:
        HeadwiseError: the named backend cannot run with these tensors.
    """
    name = choose_backend(backend)
    has_triton = supports_triton(q, q.shape[-1], 0, v.shape[-1])
    plain = q.shape[1] == 1 and lengths is None and starts is None and block_table is None and window is None
    masks: dict[str, Any] = dict(lengths=lengths, starts=starts, block_table=block_table, window=window)
    if name == "triton" and not has_triton:
        raise backend_error("gqa_decode", name, "it needs half precision on CUDA and widths in multiples of 16")
    if name == "sdpa" and backend and (with_lse or not plain):
        raise backend_error("gqa_decode", name, "it needs one query token on a full contiguous cache, without LSE")
    # Measured: on Hopper this kernel is never slower than torch's; elsewhere torch's is faster where it can run.
    if plain and not with_lse:
        torch_is_faster = name == "auto" and has_triton and not uses_hopper_kernel(q, v.shape[-1], is_latent=False)
        if name == "sdpa" or torch_is_faster:
            return _sdpa(q, k, v, scale), None
    if name != "reference" and has_triton:
        from headwise.kernels.gqa_decode import triton

        return triton.gqa_decode(q, k, v, scale=scale, **masks)
    return reference.gqa_decode(q, k, v, scale=scale, **masks)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Run torch's attention for one query token, with the heads before the tokens."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)
