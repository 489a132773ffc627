"""Patch Triton's interpreter, which tests/conftest.py chooses where there is no GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_index(tensor: Any, scope: Any) -> None:
        """Convert one-element arrays to range bounds as NumPy 2.4 accepts it; Triton before 3.7 does not."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_index
