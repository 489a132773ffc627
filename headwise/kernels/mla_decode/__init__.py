"""Decode on the latent cache of MLA, in absorbed form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.kernels.decode.latent_fp8 import DTYPE
from headwise.kernels.dispatch import backend_error, choose_backend, supports_triton
from headwise.kernels.mla_decode import reference


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from the newest tokens of each sequence to the latent cache of MLA, on the fastest backend.

    `headwise.kernels.mla_decode.reference` is the specification. torch has no attention on a latent cache.

    Args:
        q_latent: (batch, S, heads, kv_lora_rank), the query without its rotary part, times `k_up`.
        q_rope: (batch, S, heads, qk_rope_head_dim), rotated.
        latent: (batch, capacity, kv_lora_rank), after the latent norm; with a block table
            (pages, page_size, kv_lora_rank).
        k_rope: as `latent`, qk_rope_head_dim numbers, rotated.
        scale: of the scores.
        latent_scale: as `latent`, one float32 for each block of 128 numbers; the latent is then e4m3
            (`headwise.kernels.decode.latent_fp8`), and the rotary key has the type of the queries.
        lengths: (batch) int32, tokens in the cache; None: capacity.
        starts: (batch) int32, first visible token (left padding); None: 0.
        block_table: (batch, max_pages) int32, the page of each run of page_size tokens.
        window: sliding window in tokens, the token itself counted.
        indices: (batch, S, count) int32, in place of a block table: the tokens of the cache that each query token
            attends to, visible ones first; None: all visible tokens.
        backend: "auto", "triton" or "reference"; None: HEADWISE_KERNELS, else "auto".

    Returns:
        The weighted latents (batch, S, heads, kv_lora_rank), and the log-sum-exp (batch, S, heads).

    Raises:
        HeadwiseError: the named backend cannot run with these tensors.
        ValueError: `indices` are given with a block table or a window, or an FP8 latent has another type. For the
            kernels also: the rotary key beside it has another type than the queries.
    """
    if latent_scale is not None and latent.dtype != DTYPE:
        raise ValueError(f"a latent with scales is {DTYPE}, and this one is {latent.dtype}: view it as {DTYPE}")
    if indices is not None and (block_table is not None or window is not None):
        raise ValueError("indices take the place of a block table and of a window")
    name = choose_backend(backend)
    has_triton = supports_triton(q_latent, q_latent.shape[-1], q_rope.shape[-1], q_latent.shape[-1])
    options: dict[str, Any] = dict(
        scale=scale,
        latent_scale=latent_scale,
        lengths=lengths,
        starts=starts,
        block_table=block_table,
        window=window,
        indices=indices,
    )
    if name == "triton" and not has_triton:
        raise backend_error("mla_decode", name, "it needs half precision on CUDA and widths in multiples of 16")
    if name == "sdpa" and backend:
        raise backend_error("mla_decode", name, "torch has no attention on a latent cache")
    if name != "reference" and has_triton:
        if latent_scale is not None and k_rope.dtype != q_rope.dtype:
            raise ValueError(
                f"the rotary key is {k_rope.dtype}, and the queries are {q_rope.dtype}: convert the queries"
            )
        from headwise.kernels.mla_decode import triton

        return triton.mla_decode(q_latent, q_rope, latent, k_rope, **options)
    return reference.mla_decode(q_latent, q_rope, latent, k_rope, **options)
