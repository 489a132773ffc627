"""Decode on the latent cache of MLA, in absorbed form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.kernels.dispatch import refuse, requested, triton_serves
from headwise.kernels.mla_decode import reference


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    *,
    scale: float,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.mla_decode` by the fastest means at hand; torch's own attention has none for latent caches.

    Args:
        backend: "auto", "triton" or "reference"; None: HEADWISE_KERNELS, else "auto".

    Raises:
        HeadwiseError: the backend asked for by name cannot serve these tensors.
    """
    name = requested(backend)
    served = triton_serves(q_latent, q_latent.shape[-1], q_rope.shape[-1], q_latent.shape[-1])
    where: dict[str, Any] = dict(lengths=lengths, starts=starts, block_table=block_table, window=window)
    if name == "triton" and not served:
        raise refuse("mla_decode", name, "it needs CUDA tensors of half precision and widths in multiples of 16")
    if name == "sdpa" and backend:
        raise refuse("mla_decode", name, "torch has no attention on a latent cache")
    if name != "reference" and served:
        from headwise.kernels.mla_decode import triton

        return triton.mla_decode(q_latent, q_rope, latent, k_rope, scale=scale, **where)
    return reference.mla_decode(q_latent, q_rope, latent, k_rope, scale=scale, **where)
