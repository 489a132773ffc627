"""Running lm-eval's tasks."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
from lm_eval.api.metrics import bootstrap_stderr

from headwise.eval.tasks.harness import in_one_process


def mean(values: Any) -> float:
    return float(sum(values) / len(values))


def test_the_bootstrap_of_perplexities_forks_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork(*_: Any, **__: Any) -> None:
        raise AssertionError("a process with threads was forked")

    monkeypatch.setattr(multiprocessing, "Pool", fork)
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    with in_one_process():
        assert 0.3 < bootstrap_stderr(mean, [0.0, 1.0, 2.0, 3.0], iters=200) < 0.8
    assert "DISABLE_MULTIPROC" not in os.environ
    with pytest.raises(AssertionError, match="forked"):
        bootstrap_stderr(mean, [0.0, 1.0], iters=200)
