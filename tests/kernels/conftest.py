"""What Triton's interpreter (chosen in tests/conftest.py where there is no GPU) needs."""

from __future__ import annotations

import importlib.util

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_index(tensor, scope):
        """Triton before 3.7 turns one-element arrays into range bounds in a way NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_index
