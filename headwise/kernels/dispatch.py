"""Choose the backend of a kernel call: the Triton kernels, torch's own attention, or the reference."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from headwise.errors import HeadwiseError

# Found out once, at import: torch.compile cannot look for packages.
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "triton", "sdpa", "reference")
VARIABLE = "HEADWISE_KERNELS"


def choose_backend(backend: str | None) -> str:
    """Return a given backend, else that of the environment variable HEADWISE_KERNELS, else "auto".

    Args:
        backend: argument of a kernel function; None: not given.

    Raises:
        HeadwiseError: there is no backend of this name.
    """
    name = backend or os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        source = "backend" if backend else VARIABLE
        raise HeadwiseError(f"{source} is '{name}', which is no backend.", f"Choose one of {', '.join(BACKENDS)}.")
    return name


def supports_triton(q: Tensor, head_dim: int, rope_dim: int, value_dim: int) -> bool:
    """Return whether the Triton kernels can run: half precision on CUDA, widths that are multiples of 16.

    The age of the card is checked when the kernel runs: torch.compile traces this function and cannot read it.

    Args:
        q: a query tensor, for its type and device.
        head_dim: numbers of a key without its rotary part.
        rope_dim: numbers of the rotary key; 0: none.
        value_dim: numbers of a value.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    return HAS_TRITON and q.is_cuda and half and head_dim % 16 == 0 and rope_dim % 16 == 0 and value_dim % 16 == 0


def uses_hopper_kernel(q: Tensor, value_dim: int, rope_dim: int = 0, *, is_latent: bool) -> bool:
    """Return whether the backend "triton" runs a kernel for Hopper, given caches with aligned rows.

    Args:
        q: a query tensor on CUDA.
        value_dim: numbers of a value; of a latent, its rank.
        rope_dim: numbers of the rotary key of a latent.
        is_latent: whether the values are a latent (MLA), which is padded where needed.
    """
    from headwise.kernels.decode import tiling

    card = tiling.card_of(q.device.index)
    return tiling.choose_tiles(card, 1, value_dim, rope_dim, value_dim, is_latent).hopper


def backend_error(operation: str, backend: str, reason: str) -> HeadwiseError:
    """Return the error for a named backend that cannot run an operation.

    Args:
        operation: name of the kernel function.
        backend: the given backend.
        reason: what the backend needs.
    """
    return HeadwiseError(f"{operation} cannot run on backend '{backend}': {reason}.", "Use backend 'auto'.")
