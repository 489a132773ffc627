"""A stock model with hooks on its attention, and the stream of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headwise.convert.calibration.layer_stream import LayerRecord, LayerStream
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import Architecture, find_architecture
from tests import tiny_models
from tests.convert.rows import load


def hook_whole_model(
    source: Path, arch: Architecture, tokens: torch.Tensor, **options: Any
) -> list[dict[str, Any]]:
    """Each layer's attention input x, output y, weights p and input z of the output matrix, from hooks."""
    model = load(source, arch, **options)
    captured: list[dict[str, Any]] = []
    layouts = arch.layouts(tiny_models.read_config(source))
    for layer in (n for n, layout in enumerate(layouts) if layout.attends):
        attention = model.get_submodule(f"{arch.module.format(layer=layer)}.{arch.attention}")
        here: dict[str, Any] = {}

        def note(module: Any, args: Any, kwargs: Any, output: Any, here: dict[str, Any] = here) -> None:
            here |= {"x": kwargs.get("hidden_states", args[0] if args else None), "y": output[0], "p": output[1]}

        def note_values(module: Any, args: Any, here: dict[str, Any] = here) -> None:
            here["z"] = args[0]

        attention.register_forward_hook(note, with_kwargs=True)
        attention.get_submodule(arch.projections["o"]).register_forward_pre_hook(note_values)
        captured.append(here)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return captured


def stream(source: Path, tokens: torch.Tensor, **options: Any) -> list[LayerRecord]:
    checkpoint = open_checkpoint(source)
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    return list(LayerStream(checkpoint, arch, tokens).records(**options))
