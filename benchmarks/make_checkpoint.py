"""Make a checkpoint with the shapes of Llama 2 and random weights, in shards of three gigabytes of bfloat16.

    python benchmarks/make_checkpoint.py OUT [--shape 7b] [--layers 32] [--device cuda]

The shape 7b has 13.5 GB; two layers of 70b have 4.5 GB.

One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headwise
from headwise.io.writer import OutputTensor, Writer

TOKENIZER = Path(headwise.__file__).parent / "demo" / "model"


SHAPES = {
    "7b": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}


def llama_2(shape: str, layers: int | None = None) -> LlamaConfig:
    """Return the configuration of a shape, with another number of layers where one is given."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    if layers:
        config.num_hidden_layers = layers
    return config


def make(out: Path, *, shape: str = "7b", layers: int | None = None, seed: int = 0, device: str = "cpu") -> Path:
    """Write the checkpoint; weights are normal with the deviation that Llama starts from, norms are ones.

    A GPU draws them faster than a CPU, and draws others.
    """
    config = llama_2(shape, layers)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    outputs = [OutputTensor(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in shapes.items()]
    random = torch.Generator(device).manual_seed(seed)
    identity = {"shape": shape, "layers": layers, "seed": seed, "device": device}
    with Writer(out, outputs, identity=identity, max_shard_size="3GB") as writer:
        for output in outputs:
            tensor = torch.ones(output.shape, device=device)
            if len(output.shape) > 1:
                tensor.normal_(0, config.initializer_range, generator=random)
            writer.write(output.name, tensor.to(output.dtype).cpu())
        writer.add_text("config.json", json.dumps(config.to_dict(), indent=2))
        for path in sorted(TOKENIZER.glob("tokenizer*")):
            # Any tokenizer whose ids are below 32000 will do for calibrating on random weights.
            writer.add_file(path)
        return writer.publish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="in place of those of the shape")
    parser.add_argument("--device", default="cpu", help="a GPU draws the weights faster")
    arguments = parser.parse_args()
    print(make(arguments.out, shape=arguments.shape, layers=arguments.layers, device=arguments.device))
