"""Decode kernels for the converted layouts: references that run everywhere, and Triton kernels for GPUs."""

from __future__ import annotations

import importlib
from typing import Any

# Imported at once: each function has the name of its folder and must replace it in this namespace.
from headwise.kernels.gqa_decode import gqa_decode
from headwise.kernels.mla_decode import mla_decode
from headwise.kernels.rope_cache import rope_cache

__all__ = ["disable", "enable", "gqa_decode", "mla_decode", "rope_cache"]


def __getattr__(name: str) -> Any:
    """Import `enable` or `disable` at the first use, because they need transformers."""
    if name not in ("enable", "disable"):
        raise AttributeError(f"module 'headwise.kernels' has no attribute {name!r}")
    return getattr(importlib.import_module("headwise.kernels.patch"), name)
