"""Who computes: the Triton kernels, torch's own attention, or the reference."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

from headwise.errors import HeadwiseError

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
    """Whether the Triton kernels can compute this: half precision, widths in multiples of 16, a card from sm_80.

    Args:
        q: any of the query tensors (for its type and device).
        head, rope, value: numbers per key in the key, the rotary key (0: none) and the value.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from headwise.kernels.attend import launch

    return launch.supports(q, head, rope, value)


def refuse(operation: str, backend: str, why: str) -> HeadwiseError:
    """The error for a backend that was asked for by name and cannot serve."""
    return HeadwiseError(f"{operation} cannot run on backend '{backend}': {why}.", "Use backend 'auto'.")
