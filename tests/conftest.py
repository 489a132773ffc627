"""What must be decided before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Without a GPU the kernels run under Triton's interpreter, which counts only if it is chosen before anything
    # imports Triton, as parts of transformers and of torch's compiler do.
    os.environ.setdefault("TRITON_INTERPRET", "1")
