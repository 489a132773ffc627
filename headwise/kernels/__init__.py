"""Decode kernels for the converted layouts: references that run anywhere, and Triton where a card has it."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "mla_decode": "headwise.kernels.mla_decode",
    "gqa_decode": "headwise.kernels.gqa_decode",
    "rope_cache": "headwise.kernels.rope_cache",
    "enable": "headwise.kernels.patch",
    "disable": "headwise.kernels.patch",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'headwise.kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
