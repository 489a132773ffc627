"""headwise: change how a trained language model attends, and prove what changed.

The verbs of the command line are functions here: `inspect`, `convert`, `verify`, `uptrain`, `evaluate`, `bench`,
`update_card` and `push`. They are imported on first use, so that importing headwise (or asking the command for
help) never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "inspect": "headwise.convert.plan",
    "convert": "headwise.convert.pipeline",
    "verify": "headwise.convert.verify",
    "evaluate": "headwise.eval.evaluate",
    "bench": "headwise.eval.bench",
    "uptrain": "headwise.recipes.uptrain",
    "update_card": "headwise.eval.card",
    "push": "headwise.publish",
    "HeadwiseError": "headwise.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
