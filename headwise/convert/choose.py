"""From what was asked for to a `Target`: the layout, the positions, and the refusals that need no weights."""

from __future__ import annotations

from typing import Any

import torch

from headwise.convert.base import Target
from headwise.convert.gqa.target import GroupedTarget
from headwise.convert.mla.target import LatentTarget
from headwise.convert.positions import context as longer
from headwise.convert.positions.windows import with_window
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture, find

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_target(
    checkpoint: Checkpoint,
    arch: Architecture,
    *,
    to: str | None,
    groups: int | None,
    method: str,
    grouping: str | None,
    dtype: str | None,
    seed: int,
    context: int | None,
    rope: str,
    rope_theta: float | None,
    sliding_window: int | None,
    window_layers: str,
    measured: bool = True,
    **latent: Any,
) -> Target:
    """Decide the conversion.

    Args:
        measured: something besides what the method asks for is measured on the layers, such as for a refit.

    Raises:
        HeadwiseError: the request does not fit the model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise HeadwiseError(f"{dtype!r} is not a dtype.", f"Name one of {', '.join(DTYPES)}.")
    kept = DTYPES[dtype] if dtype else None
    if to is None and context is None and sliding_window is None and dtype is None:
        raise HeadwiseError("There is nothing to change.", "Give --to, --context, --sliding-window or --dtype.")
    config = checkpoint.config
    layout = arch.layouts(config)[0]
    notes: list[str] = []
    config = arch.with_groups(config, layout.num_key_value_heads)
    if dtype is not None:
        for part in (config, arch.text_config(config)):
            part["dtype"] = part["torch_dtype"] = dtype
    if context is not None:
        config, notes = longer.extend(config, arch, context=context, rule=rope, rope_theta=rope_theta)
    if sliding_window is not None:
        config = with_window(config, arch, sliding_window or None, window_layers)
    parent = find(config, checkpoint.tensors)
    target: Target
    if to == "mla":
        target = LatentTarget(checkpoint, parent, config, method=method, dtype=kept, **latent)
        target.notes[:0] = notes
        return target
    if to == "gqa" and groups is None:
        raise HeadwiseError("--to gqa needs the number of KV heads.", "Add --groups N.")
    count = {"mqa": 1, "mha": layout.num_attention_heads, "gqa": groups}.get(to or "")
    target = GroupedTarget(
        checkpoint,
        arch,
        parent.with_groups(config, layout.num_key_value_heads if count is None else count),
        config,
        groups=count,
        method=method,
        grouping=grouping or ("optimal" if method == "optimal" else "contiguous"),
        seed=seed,
        dtype=kept,
        measured=measured,
    )
    target.notes[:0] = notes
    return target
