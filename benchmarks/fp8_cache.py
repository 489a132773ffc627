"""Loss of an MLA folder with its latent cache in FP8, by the basis of the latent.

    python benchmarks/fp8_cache.py DIR

DIR is a folder that `headwise convert --to mla` wrote. Every layer is written again, in bfloat16, in each basis:

- "uncorrelated": numbers of unit size, ordered by their share of the output;
- "rotated": the same behind a Hadamard rotation alone;
- "balanced": that of mathematics 4f, which a conversion writes.

Moments are those of calibration text, and the loss is that of held-out text. The arithmetic is float32. The cache
is rounded to bfloat16; to FP8 in blocks of 128 with a scale each, and the rotary key in bfloat16; to FP8 with the
one scale 1, rotary key included, as vLLM's `--kv-cache-dtype fp8` does without calibrated scales; and to the latter
with the rotary key in bfloat16. Prints one JSON line for each basis and cache: nats per token, and the change from
the bfloat16 cache in the first basis with its standard error over blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.mla.latent_basis import balanced_basis, flat_rotation
from headwise.kernels.decode.latent_fp8 import DTYPE, dequantize_latent, quantize_latent
from headwise.measure.loss import token_nats
from headwise.models import deepseek
from headwise.models.layout import LatentWeights
from headwise.text.blocks import blocks_from


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def blockwise(x: Tensor) -> Tensor:
    return dequantize_latent(*quantize_latent(bf16(x)))


def one_scale(x: Tensor) -> Tensor:
    return bf16(x).to(DTYPE).float()


# The rounding of the latent and of the rotary key.
CACHES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "bfloat16": (bf16, bf16),
    "FP8, blocks of 128": (blockwise, bf16),
    "FP8, one scale": (one_scale, one_scale),
    "FP8, one scale; rotary key in bfloat16": (one_scale, bf16),
}


def uncorrelated(latent: LatentWeights, moment: Tensor) -> LatentWeights:
    energy, vectors = torch.linalg.eigh(latent.kv_down @ moment @ latent.kv_down.T)
    present = energy > 1e-12 * energy[-1]
    size = torch.where(present, energy, 1.0).sqrt()
    up = torch.cat([latent.k_up, latent.v_up], 1) @ (vectors * size)
    basis = torch.linalg.eigh(torch.einsum("har,has->rs", up, up))[1].flip(1)
    return changed(latent, basis.T @ (vectors / size).T, (vectors * size) @ basis)


def rotated(latent: LatentWeights, moment: Tensor) -> LatentWeights:
    rotation = flat_rotation(len(latent.kv_down))
    return changed(uncorrelated(latent, moment), rotation, rotation.T)


def changed(latent: LatentWeights, into: Tensor, back: Tensor) -> LatentWeights:
    return replace(latent, kv_down=into @ latent.kv_down, k_up=latent.k_up @ back, v_up=latent.v_up @ back)


BASES = {"uncorrelated": uncorrelated, "rotated": rotated, "balanced": balanced_basis}


def input_moments(model: Any, blocks: Tensor) -> list[Tensor]:
    """Return the second moment of the attention inputs of each layer."""
    layers = model.model.layers
    moments = [torch.zeros(model.config.hidden_size, model.config.hidden_size).double() for _ in layers]

    def record(layer: int, _module: Any, args: Any, named: dict[str, Any]) -> None:
        x = named.get("hidden_states", args[0] if args else None).flatten(0, 1).double()
        moments[layer] += x.T @ x / blocks.numel()

    hooks = [
        layer.self_attn.register_forward_pre_hook(partial(record, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    token_nats(model, blocks, batch_size=1)
    for hook in hooks:
        hook.remove()
    return moments


def main() -> None:
    """Measure every basis with every cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", default="mixture", help="text of both splits [mixture]")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bases", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--caches", type=int, nargs="*", default=range(len(CACHES)), help="0 to 3, in their order")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    text = partial(blocks_from, options.text, tokenizer, length=options.length)
    held = torch.as_tensor(text(split="heldout", count=options.blocks))
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    config, frequencies = model.config.to_dict(), torch.ones(model.config.qk_rope_head_dim // 2)
    moments = input_moments(model, torch.as_tensor(text(count=options.blocks)))
    attentions = [layer.self_attn for layer in model.model.layers]
    rounding = [CACHES["bfloat16"]]

    def expand(module: Any, latent: Tensor, k_rope: Tensor) -> Any:
        of_latent, of_rope = rounding[0]
        return type(module).expand_kv(module, of_latent(latent), of_rope(k_rope))

    for attention in attentions:
        attention.expand_kv = partial(expand, attention)
    written = [
        deepseek.read_attention({f"a.{n}": t.clone() for n, t in a.state_dict().items()}, "a", config, frequencies)
        for a in attentions
    ]
    base: Tensor | None = None
    for basis in options.bases:
        for attention, latent, moment in zip(attentions, written, moments, strict=True):
            layer = BASES[basis](latent, moment)
            tensors = deepseek.attention_tensors(
                layer, "a", moment=moment, q_lora_rank=config["q_lora_rank"], dtype=torch.bfloat16
            )
            attention.load_state_dict({name.removeprefix("a."): tensor.float() for name, tensor in tensors.items()})
        for cache in [list(CACHES)[index] for index in options.caches]:
            rounding[0] = CACHES[cache]
            nats = token_nats(model, held, batch_size=1).double()
            base = nats if base is None else base
            change = (nats - base).mean(1)
            row = {"basis": basis, "cache": cache, "nats": round(nats.mean().item(), 5)}
            row |= {"change": round(change.mean().item(), 5)}
            row |= {"standard_error": round(change.std().item() / len(change) ** 0.5, 5)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
