"""Small checkpoints for the tests of reading and writing; their tensors need not make a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "dtype": "bfloat16"}


def tensors_for(seed: int = 0) -> dict[str, Tensor]:
    """A dozen tensors of mixed dtypes, one of them empty and one a scalar."""
    random = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(32, 16, generator=random).bfloat16()}
    for layer in range(2):
        for part in "qkvo":
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            tensors[name] = torch.randn(16, 16, generator=random).bfloat16()
    tensors["model.norm.weight"] = torch.randn(16, generator=random)
    tensors["model.half"] = torch.randn(5, generator=random).half()
    tensors["model.mask"] = torch.tensor([True, False, True])
    tensors["model.scalar"] = torch.tensor(0.5)
    tensors["model.empty"] = torch.empty(0, 4)
    return tensors


def make_checkpoint(folder: Path, tensors: dict[str, Tensor], *, shards: int = 1) -> Path:
    """Save tensors as a checkpoint folder, through the safetensors library."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_raw(path: Path, header: Any, data: bytes) -> None:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
