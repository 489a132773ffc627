"""Compare the tensor names and shapes of a checkpoint with its stock class, from headers alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models.stock import empty_model, load_into

# Buffers that old releases of transformers saved and no release reads.
LEFTOVERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_bias|bias))$")


@dataclass(frozen=True)
class StockMatch:
    """A stock model without weights, and the differences between its tensors and a checkpoint's.

    Attributes:
        model: the stock model.
        count: tensors of the checkpoint, without those that no release reads.
        tied: parameters that share another's weights.
        missing: names that only the class has.
        unexpected: names that only the checkpoint has.
        mismatched: name, shape in the checkpoint, shape in the class.
    """

    model: Any
    count: int
    tied: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def wrong(self) -> list[str]:
        """Names of all missing, unexpected and mismatched tensors."""
        return [*self.missing, *self.unexpected, *(name for name, _, _ in self.mismatched)]


def match_stock_class(checkpoint: Checkpoint, auto_class: str) -> StockMatch:
    """Load a checkpoint's shapes into its stock class, with transformers' own loader.

    Args:
        checkpoint: the checkpoint.
        auto_class: name of the transformers auto class.

    Returns:
        The model without weights, and its differences from the checkpoint.
    """
    # A config may name more layers or experts than there are files for. Each takes its time to make, so the
    # class gets as many parameters as the checkpoint could fill, were its tensors fused by the dozen.
    model = empty_model(checkpoint.config, auto_class, most=1000 + 12 * len(checkpoint.tensors))
    shapes = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in checkpoint.tensors.items()
        if not LEFTOVERS.search(name)
    }
    found = load_into(model, shapes, "meta")
    tied = dict(model.all_tied_weights_keys or {})
    return StockMatch(
        model,
        len(shapes),
        tied,
        sorted(found.missing_keys - tied.keys()),
        sorted(found.unexpected_keys),
        sorted((name, tuple(here), tuple(there)) for name, here, there in found.mismatched_keys),
    )


def check_source_complete(checkpoint: Checkpoint, auto_class: str) -> None:
    """Refuse a source that its stock class cannot run, before anything is computed from it.

    Args:
        checkpoint: the source.
        auto_class: name of the transformers auto class.

    Raises:
        HeadwiseError: a tensor is missing, or its shape differs from the shape that the config implies.
    """
    found = match_stock_class(checkpoint, auto_class)
    hint = "The checkpoint and its config.json do not belong together, or a shard is incomplete."
    for name, here, there in found.mismatched:
        raise HeadwiseError(f"tensor {name} has shape {here}, and config.json promises {there}.", hint)
    for name in found.missing:
        raise HeadwiseError(f"tensor {name} is missing; config.json promises it.", hint)
