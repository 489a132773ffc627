"""Rotary embedding, latent norm and cache write of MLA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.kernels.dispatch import HAS_TRITON, backend_error, choose_backend
from headwise.kernels.rope_cache import reference


def rope_cache(
    q_rope: Tensor,
    compressed: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    latent_cache: Tensor,
    k_rope_cache: Tensor,
    slots: Tensor,
    *,
    eps: float,
    interleaved: bool = False,
    attention_scaling: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Rotate queries and keys, normalize the latents and write the caches, in one launch on a CUDA card.

    `headwise.kernels.rope_cache.reference` is the specification.

    Args:
        q_rope: (tokens, heads, qk_rope_head_dim), not yet rotated.
        compressed: (tokens, kv_lora_rank + qk_rope_head_dim), [latent ; rotary key] as projected.
        norm_weight: (kv_lora_rank), of the RMSNorm on the latent.
        positions: (tokens) integers.
        frequencies: (qk_rope_head_dim / 2), float32, radians per position.
        latent_cache: (blocks, block_size, kv_lora_rank), written in place.
        k_rope_cache: (blocks, block_size, qk_rope_head_dim), written in place.
        slots: (tokens) int64, the row of each token in the caches; negative: not cached.
        eps: epsilon of the RMSNorm.
        interleaved: whether plane i has the numbers 2i and 2i + 1 of the input.
        attention_scaling: factor on cosine and sine (YaRN).
        backend: "auto", "triton" or "reference"; None: HEADWISE_KERNELS, else "auto".

    Returns:
        The rotated queries, with the shape and type of `q_rope`.

    Raises:
        HeadwiseError: the backend "triton" is named and there is no Triton, or the tensors are on the CPU.
    """
    name = choose_backend(backend)
    has_triton = HAS_TRITON and q_rope.is_cuda
    if name == "triton" and not has_triton:
        raise backend_error("rope_cache", name, "it needs CUDA tensors and Triton")
    tensors = (q_rope, compressed, norm_weight, positions, frequencies, latent_cache, k_rope_cache, slots)
    options: dict[str, Any] = dict(eps=eps, interleaved=interleaved, attention_scaling=attention_scaling)
    if name == "reference" or not has_triton:
        return reference.rope_cache(*tensors, **options)
    from headwise.kernels.rope_cache import triton

    return triton.rope_cache(*tensors, **options)
