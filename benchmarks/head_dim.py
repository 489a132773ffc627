"""Compare smaller heads with fewer heads at an equal cache: closed forms in memory.

    python benchmarks/head_dim.py [PARENT] --head-dims 16 8 4 [--calibrate builtin] [--heldout builtin]

A smaller head keeps some rotary planes, the same in all heads and layers, because a config has one list of
frequencies: those with the largest energy of scores, or planes at equal distances. Its values keep the
directions that cost the output least. Output matrices are solved as in a conversion. Rows that a smaller head
has not are zero, so that the stock class of the parent computes the smaller model.
`benchmarks/heads_by_layer.py` gives the losses of fewer heads on the same text. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.calibration.layer_stream import LayerRecord, LayerStream
from headwise.convert.mla.features import phase_table
from headwise.convert.refit.output_projection import solve_output_projection
from headwise.io.reader import open_checkpoint
from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.loss import nats_per_token
from headwise.models.architecture import find_architecture
from headwise.models.stock import empty_model, load_into
from headwise.models.stock_match import match_source
from headwise.text.blocks import blocks_from


def heads_of(weight: Tensor, head_dim: int) -> Tensor:
    """Return the rows of every head, (heads, head_dim, D)."""
    return weight.double().unflatten(0, (-1, head_dim))


def plane_energy(q: Tensor, k: Tensor, record: LayerRecord, frequencies: Tensor) -> Tensor:
    """Return the energy of every plane's scores, without what shifts all scores of a query, summed over heads."""
    assert record.key_moment is not None and record.value_moment is not None and record.distances is not None

    def energy(rows: Tensor, moment: Tensor) -> Tensor:
        rows = torch.einsum("hid,de,hie->hi", rows, moment[:-1, :-1], rows)
        return rows[:, : rows.shape[1] // 2] + rows[:, rows.shape[1] // 2 :]

    phase = phase_table(frequencies, record.distances.shape[1]) @ record.distances.to(torch.complex128).T
    group = len(q) // len(k)
    keys, means = (energy(k, m).repeat_interleave(group, 0) for m in (record.key_moment, record.value_moment))
    return (energy(q, record.moment) * (keys - phase.T.abs().square() * means)).sum(0)


def leading_values(v: Tensor, o: Tensor, moment: Tensor, width: int) -> Tensor:
    """Return values of the same shape within `width` dimensions, those that cost the output least."""
    group = len(o) // len(v)
    cost = torch.einsum("hdi,hdj->hij", o, o).unflatten(0, (-1, group)).sum(1)
    energies, vectors = torch.linalg.eigh(v @ moment @ v.mT)
    sizes = energies.clamp_min(1e-12 * energies[:, -1:]).sqrt()
    root, inverse = (vectors * s[:, None] @ vectors.mT for s in (sizes, 1 / sizes))
    kept = torch.linalg.eigh(root @ cost @ root)[1][..., -width:]
    return root @ kept @ kept.mT @ inverse @ v


def main() -> None:
    """Choose planes, reduce every layer, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", nargs="?", default=str(EMBEDDED_MODEL))
    parser.add_argument("--head-dims", type=int, nargs="+", required=True)
    parser.add_argument("--calibrate", default="builtin")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--heldout", default="builtin", help="text to measure on")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.parent)
    held = blocks_from(options.heldout, tokenizer, split="heldout", length=options.length, count=options.blocks)
    text = blocks_from(options.calibrate, tokenizer, length=512, count=options.calibration_tokens // 512)
    model: Any = AutoModelForCausalLM.from_pretrained(options.parent, dtype=torch.float32).eval()
    base = nats_per_token(model, held, batch_size=2).nats
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint = match_source(open_checkpoint(options.parent))
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    head_dim, layers = arch.layouts(checkpoint.config)[0].head_dim, model.model.layers
    print(json.dumps({"parent": base, "tokens": held[:, 1:].numel(), "head_dim": head_dim}), flush=True)

    def parts(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prefix = f"model.layers.{number}.self_attn"
        q, k, v = (heads_of(original[f"{prefix}.{n}_proj.weight"], head_dim) for n in "qkv")
        return q, k, v, original[f"{prefix}.o_proj.weight"].double().unflatten(1, (-1, head_dim)).transpose(0, 1)

    energy = torch.zeros(head_dim // 2, dtype=torch.float64)
    frequencies = arch.stock_config(checkpoint.config).rope_parameters["rope_theta"] ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    )
    for record in LayerStream(checkpoint, arch, text).records():
        layer_energy = plane_energy(*parts(record.index)[:2], record, frequencies)
        energy += layer_energy / layer_energy.sum()
    for width, choice in ((w, c) for w in options.head_dims for c in ("energy", "even")):
        planes = energy.topk(width // 2).indices
        if choice == "even":
            planes = torch.arange(width // 2) * head_dim // width
        kept = torch.cat([planes, planes + head_dim // 2])
        for record in LayerStream(checkpoint, arch, text).records(keep_activations=True):
            q, k, v, o = parts(record.index)
            mask = torch.zeros(head_dim, 1, dtype=torch.float64).index_fill_(0, kept, 1.0)
            assert record.value_moment is not None
            v = leading_values(v, o, record.value_moment[:-1, :-1], width)
            prefix = f"model.layers.{record.index}.self_attn"
            rows = {"q": q * mask, "k": k * mask, "v": v}
            tensors = {f"{prefix}.{n}_proj.weight": each.flatten(0, 1) for n, each in rows.items()}
            tensors[f"{prefix}.o_proj.weight"] = original[f"{prefix}.o_proj.weight"]
            empty = empty_model(checkpoint.config, arch.auto_class)
            load_into(empty, {name: tensor.float() for name, tensor in tensors.items()}, "cpu")
            attention = empty.get_submodule(prefix)
            solve_output_projection(attention, attention.o_proj, record, spare=False, device=torch.device("cpu"))
            layers[record.index].self_attn.load_state_dict(attention.state_dict())
        loss = nats_per_token(model, held, batch_size=2).nats - base
        model.load_state_dict(original)
        result = {
            "head_dim": width,
            "choice": choice,
            "cache": width / head_dim,
            "planes": sorted(planes.tolist()),
            "loss": loss,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
