"""Absorbed MLA decode on the shared kernel."""

from __future__ import annotations

from torch import Tensor

from headwise.kernels.decode.attend import attend


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
) -> tuple[Tensor, Tensor]:
    """As `reference.mla_decode`; rank and rotary width multiples of 16."""
    latent, k_rope = latent[..., None, :], k_rope[..., None, :]
    return attend(q_latent, q_rope, latent, k_rope, None, scale, lengths, starts, block_table, window)
