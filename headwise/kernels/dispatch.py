"""Who computes: the Triton kernels, torch's own attention, or the reference."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from headwise.errors import HeadwiseError

# Asked once, here: torch.compile cannot look for packages.
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "triton", "sdpa", "reference")
VARIABLE = "HEADWISE_KERNELS"


def requested(backend: str | None) -> str:
    """The backend asked for: the argument, else the environment variable HEADWISE_KERNELS, else "auto"."""
    name = backend or os.environ.get(VARIABLE) or "auto"
    if name not in BACKENDS:
        source = "backend" if backend else VARIABLE
        raise HeadwiseError(f"{source} is '{name}', which is no backend.", f"Choose one of {', '.join(BACKENDS)}.")
    return name


def triton_serves(q: Tensor, head: int, rope: int, value: int) -> bool:
    """Whether the Triton kernels can compute this: half precision on CUDA, widths in multiples of 16.

    That the card is new enough is checked when they run: here torch.compile looks on, and cannot ask.

    Args:
        q: any of the query tensors (for its type and device).
        head, rope, value: numbers per key in the key, the rotary key (0: none) and the value.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    return HAS_TRITON and q.is_cuda and half and head % 16 == 0 and rope % 16 == 0 and value % 16 == 0


def hopper_serves(q: Tensor, value: int) -> bool:
    """Whether what the Triton kernels would run is the one written for Hopper."""
    from headwise.kernels.decode import tiling

    return tiling.hopper is not None and value % 64 == 0 and tiling.card_of(q.device.index).capability[0] == 9


def refuse(operation: str, backend: str, why: str) -> HeadwiseError:
    """The error for a backend that was asked for by name and cannot serve."""
    return HeadwiseError(f"{operation} cannot run on backend '{backend}': {why}.", "Use backend 'auto'.")
