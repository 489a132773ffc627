"""Rotary embedding, latent norm and cache write of MLA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.kernels.dispatch import HAS_TRITON, refuse, requested
from headwise.kernels.rope_cache import reference


def rope_cache(q_rope: Tensor, *arguments: Tensor, backend: str | None = None, **options: Any) -> Tensor:
    """`reference.rope_cache`, in one launch where Triton and a CUDA card are there.

    Args:
        backend: "auto", "triton" or "reference"; None: HEADWISE_KERNELS, else "auto".

    Raises:
        HeadwiseError: backend "triton" without Triton or with tensors on the CPU.
    """
    name = requested(backend)
    served = HAS_TRITON and q_rope.is_cuda
    if name == "triton" and not served:
        raise refuse("rope_cache", name, "it needs CUDA tensors and Triton")
    if name == "reference" or not served:
        return reference.rope_cache(q_rope, *arguments, **options)
    from headwise.kernels.rope_cache import triton

    return triton.rope_cache(q_rope, *arguments, **options)
