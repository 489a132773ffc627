"""What must be decided before any test module is imported."""

from __future__ import annotations

import gc
import os

# A thread that waits for another must not spin: on busy cores that takes ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# transformers starts four threads for every model that it loads: more work than a model of kilobytes.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

import torch

if not torch.cuda.is_available():
    # Without a GPU the kernels run under Triton's interpreter, which counts only if it is chosen before anything
    # imports Triton, as parts of transformers and of torch's compiler do.
    os.environ.setdefault("TRITON_INTERPRET", "1")


import pytest


def pytest_collection_finish() -> None:
    """Spare every test work that proves nothing."""
    from transformers import GenerationConfig, PreTrainedConfig

    # transformers renders every config for a log message, also where the message is not printed.
    for config_class in (GenerationConfig, PreTrainedConfig):
        config_class.__repr__ = object.__repr__  # type: ignore[method-assign]
    # The imported modules stay; garbage collection need not visit them.
    gc.freeze()


@pytest.fixture(autouse=True)
def quick_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert on library text and measure no loss on it: sampling from a tiny model takes seconds each time.

    Tests of these steps set the two values themselves. All texts of conversions are short.
    """
    monkeypatch.setattr("headwise.convert.settings.DEFAULT_TEXT", "builtin")
    monkeypatch.setattr("headwise.convert.calibration.corpus.LOSS_SECONDS", -1.0)
    monkeypatch.setattr("headwise.convert.calibration.loss_text.TOKENS", 512)
    monkeypatch.setattr("headwise.convert.forecast.amounts.CLOSED_FORM_TOKENS", 4096)
    monkeypatch.setattr("headwise.convert.forecast.amounts.REFIT_TOKENS_ON_CPU", 4096)


@pytest.fixture(autouse=True)
def quick_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each operation of a forecast once, on few tokens: every tiny model has shapes of its own to be timed."""
    for name, value in {"LEAST": 0.0, "FEWEST": 1, "ATTENTION_FLOPS": 0.0, "ORDER": 32}.items():
        monkeypatch.setattr(f"headwise.convert.forecast.machine.{name}", value)
