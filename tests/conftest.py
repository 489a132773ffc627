"""What must be decided before any test module is imported."""

from __future__ import annotations

import os

# A thread that waits for another must not spin: on busy cores that takes ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # Without a GPU the kernels run under Triton's interpreter, which counts only if it is chosen before anything
    # imports Triton, as parts of transformers and of torch's compiler do.
    os.environ.setdefault("TRITON_INTERPRET", "1")
