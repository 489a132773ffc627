"""Choose the target of a conversion from its settings and the model."""

from __future__ import annotations

import torch

from headwise.convert.base import Target
from headwise.convert.gqa.target import GroupedTarget
from headwise.convert.mla.target import LatentTarget
from headwise.convert.positions.moved import with_positions
from headwise.convert.settings import ConvertSettings
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture, find_architecture


def choose_target(checkpoint: Checkpoint, arch: Architecture, settings: ConvertSettings) -> Target:
    """Return the decided conversion.

    Args:
        checkpoint: the source.
        arch: its architecture.
        settings: of the conversion.

    Raises:
        HeadwiseError: the conversion is not possible for this model.
    """
    dtype: torch.dtype | None = getattr(torch, settings.dtype) if settings.dtype else None
    config = checkpoint.config
    layout = arch.layouts(config)[0]
    config = arch.with_groups(config, layout.num_key_value_heads)
    if settings.dtype is not None:
        for part in (config, arch.text_config(config)):
            part["dtype"] = part["torch_dtype"] = settings.dtype
    config, notes = with_positions(config, arch, settings)
    parent = find_architecture(config, checkpoint.tensors)
    target: Target
    if settings.to == "mla":
        target = LatentTarget(checkpoint, parent, config, settings, dtype=dtype)
    else:
        counts = {"mqa": 1, "mha": layout.num_attention_heads, "gqa": settings.groups}
        groups = counts[settings.to] if settings.to else None
        target = GroupedTarget(
            checkpoint,
            arch,
            parent.with_groups(config, layout.num_key_value_heads if groups is None else groups),
            config,
            settings,
            groups=groups,
            dtype=dtype,
        )
    target.notes[:0] = notes
    return target
