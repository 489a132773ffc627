"""The rows of the table as tiny models: their layouts, and models loaded through the stock class."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from headwise.models.architecture import Architecture, find_architecture
from tests import tiny_models

ROWS = sorted(tiny_models.CONFIGS)


@cache
def row(model_type: str) -> tuple[Architecture, dict[str, Any], int, int]:
    """The row, the config, and its numbers of query heads and KV heads."""
    config = tiny_models.config_of(model_type)
    arch = find_architecture(config)
    layout = arch.layouts(config)[0]
    return arch, config, layout.num_attention_heads, layout.num_key_value_heads


def load(folder: Path, arch: Architecture, **options: Any) -> torch.nn.Module:
    """The folder through the stock class, without a missing or an unexpected tensor."""
    model, info = getattr(transformers, arch.auto_class).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager", **options
    )
    assert not any(info.values()), info
    network: torch.nn.Module = model.eval()
    return network
