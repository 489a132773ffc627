"""Convert trained language models between MHA, GQA, MQA and MLA, and verify the result.

Every verb of the command line is a function of this package. A function is imported at its first use, so that
`import headwise` and `headwise --help` do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headwise.environment import HEADWISE_VERSION

if TYPE_CHECKING:
    from headwise.convert.inspect import inspect_model as inspect_model
    from headwise.convert.pipeline import convert_model as convert_model
    from headwise.convert.sample import sample_text as sample_text
    from headwise.convert.verify.check import verify_model as verify_model
    from headwise.errors import GateFailed as GateFailed
    from headwise.errors import HeadwiseError as HeadwiseError
    from headwise.eval.bench import bench_model as bench_model
    from headwise.eval.evaluate import evaluate_model as evaluate_model
    from headwise.eval.report.card_section import update_card as update_card
    from headwise.recipes.uptrain import uptrain_model as uptrain_model
    from headwise.records.push import push_model as push_model

__version__ = HEADWISE_VERSION

_MODULES = {
    "inspect_model": "headwise.convert.inspect",
    "convert_model": "headwise.convert.pipeline",
    "sample_text": "headwise.convert.sample",
    "verify_model": "headwise.convert.verify.check",
    "uptrain_model": "headwise.recipes.uptrain",
    "evaluate_model": "headwise.eval.evaluate",
    "bench_model": "headwise.eval.bench",
    "update_card": "headwise.eval.report.card_section",
    "push_model": "headwise.records.push",
    "HeadwiseError": "headwise.errors",
    "GateFailed": "headwise.errors",
}

__all__ = [
    "GateFailed",
    "HeadwiseError",
    "__version__",
    "bench_model",
    "convert_model",
    "evaluate_model",
    "inspect_model",
    "push_model",
    "sample_text",
    "update_card",
    "uptrain_model",
    "verify_model",
]


if not TYPE_CHECKING:  # with this function, type checkers would read every name as Any

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'headwise' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
