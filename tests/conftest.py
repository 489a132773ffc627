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


import pytest


@pytest.fixture(autouse=True)
def quick_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert on library text and measure no loss on it: sampling from a tiny model takes seconds each time.

    Tests of these steps set the two values themselves.
    """
    monkeypatch.setattr("headwise.convert.settings.DEFAULT_TEXT", "builtin")
    monkeypatch.setattr("headwise.convert.calibration.corpus.LOSS_SECONDS", -1.0)
