"""Absorbed MLA decode with the decode kernel."""

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
    latent_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.mla_decode` with the kernel; rank and rotary width are multiples of 16."""
    latent, k_rope = latent[..., None, :], k_rope[..., None, :]
    result: tuple[Tensor, Tensor] = attend(
        q_latent, q_rope, latent, k_rope, None, scale, lengths, starts, block_table, window, latent_scale
    )
    return result
