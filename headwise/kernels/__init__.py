"""Decode kernels for the converted layouts: references that run anywhere, and Triton where a card has it."""

from __future__ import annotations

import importlib
from typing import Any

# Not lazily: each function has the name of its folder and must take that name in this package from it.
from headwise.kernels.gqa_decode import gqa_decode
from headwise.kernels.mla_decode import mla_decode
from headwise.kernels.rope_cache import rope_cache

__all__ = ["disable", "enable", "gqa_decode", "mla_decode", "rope_cache"]


def __getattr__(name: str) -> Any:
    """`enable` and `disable`, which need transformers."""
    if name not in ("enable", "disable"):
        raise AttributeError(f"module 'headwise.kernels' has no attribute {name!r}")
    return getattr(importlib.import_module("headwise.kernels.patch"), name)
