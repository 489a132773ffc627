"""What proves an MLA folder: its stock attention against the factorised layer written out in float64, and against
the parent's attention where the conversion is exact."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.convert.mla.exact import exact_mla_shape
from headwise.convert.positions.context import rope_sets
from headwise.io.reader import Checkpoint
from headwise.models import deepseek, mla_source
from headwise.models.architecture import Architecture, find_architecture
from headwise.models.layout import LatentWeights, to_planes, from_planes
from headwise.models.norm_free import ATTENTION, LAYERS
from headwise.models.protocol import LatentModel
from headwise.models.stock import run_attention

# The linear norm errs below 1e-8 for an ordinary token; an exact lift is rounded once to the folder's dtype.
TOLERANCE = 1e-5
EXACT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def latent_attention(weights: LatentWeights, x: Tensor, o_bias: Tensor | None = None) -> Tensor:
    """Causal attention of an MLA layer, written out: (batch, tokens, D) float64 -> the same shape."""
    inputs = x
    if weights.kv_down.shape[1] > x.shape[-1]:
        inputs = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * weights.frequencies.double()
    turned = torch.polar(torch.ones_like(angles), angles).T  # (planes, tokens)

    def rotate(vectors: Tensor) -> Tensor:  # (..., P, tokens)
        return from_planes(to_planes(vectors, vectors.shape[-2]) * turned)

    columns = inputs.mT[:, None]  # (batch, 1, inputs, tokens)
    latent_rows = weights.kv_down @ inputs.mT  # (batch, R, tokens)
    keys = weights.k_up @ latent_rows[:, None]
    scores = (weights.q_nope @ columns).mT @ keys
    scores = scores + rotate(weights.q_rope @ columns).mT @ rotate(weights.k_rope @ inputs.mT)[:, None]
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    attention = (weights.scale * scores).masked_fill(future, -torch.inf).softmax(-1)
    values = (weights.v_up @ latent_rows[:, None]).mT
    output = torch.einsum("bhtv,hdv->btd", attention @ values, weights.o)
    return output if o_bias is None else output + o_bias.double()


def layers_compute_their_factors(
    checkpoint: Checkpoint, model: LatentModel, chosen: Sequence[int], tokens: int
) -> tuple[bool, str]:
    """The stock attention, its latent norm included, gives what the factors give without one, in float64."""
    worst = 0.0
    for layer in chosen:
        path = f"{LAYERS.format(layer=layer)}.{ATTENTION}"
        x, said = run_attention(model.config, model, path, layer, model.tensors(checkpoint, layer), tokens)
        weights, o_bias = model.weights(checkpoint, layer)
        worst = max(worst, _difference(said, latent_attention(weights, x, o_bias)))
    which = ", ".join(map(str, chosen))
    return (
        worst < TOLERANCE,
        f"attention of layers {which} within {worst:.1e} of its factors written out, in float64",
    )


def against_parent(
    checkpoint: Checkpoint,
    parent: Checkpoint,
    model: LatentModel,
    chosen: Sequence[int],
    tokens: int,
    moved: Collection[str],
    trained: bool,
) -> tuple[bool, str]:
    """What is not attention is the parent's, scaled as the config needs; an exact lift computes the same.

    Fields of the config that are named in `moved` may differ, and with them what attention computes.
    Of a model that was `trained` since, only the shape is the parent's.
    """
    arch = find_architecture(parent.config, parent.tensors)
    before = arch.layouts(parent.config)
    if len(before) != len(model.layouts):
        return False, f"the parent has {len(before)} layers, and the folder {len(model.layouts)}"
    changed = _changed_fields(model.config, parent.config, arch, moved)
    if changed:
        return False, f"config.json differs from the parent's in {', '.join(changed)}"
    if trained:
        return True, "the parent's shape and configuration; its weights were trained since"
    dtype = next(iter(checkpoint.tensors.values())).dtype
    rule = mla_source.find_mla_source(arch.text_config(parent.config), dtype)
    attention = [n for n in parent.tensors if f".{arch.attention}." in n]
    for carried in mla_source.plan_scaled_copies(rule, parent.tensors, attention):
        if carried.name not in checkpoint.tensors or not torch.equal(
            carried.apply(parent.read(carried.source), dtype), checkpoint.read(carried.name)
        ):
            return False, f"{carried.name} is not what the parent's {carried.source} becomes"
    largest = [max(sizes) for sizes in zip(*map(exact_mla_shape, before), strict=True)]
    shape = model.layouts[0]
    if moved or (shape.kv_lora_rank or 0) < largest[0] or shape.rotary_dim < largest[1]:
        return True, "outside attention, every tensor is what the parent's becomes"
    worst = 0.0
    for layer in chosen:
        path = f"{arch.module.format(layer=layer)}.{arch.attention}"
        prefix = f"{arch.layers[0].format(layer=layer)}.{arch.attention}."
        tensors = {n: parent.read(n) for n in parent.tensors if n.startswith(prefix)}
        x, wanted = run_attention(parent.config, arch, path, layer, tensors, tokens)
        weights, o_bias = model.weights(checkpoint, layer)
        ours = latent_attention(weights, x, o_bias) / rule.factors["residual"]
        worst = max(worst, _difference(ours, wanted))
    limit = EXACT_TOLERANCE.get(dtype, 3e-2)
    return worst < limit, f"exact: attention of the chosen layers within {worst:.1e} of the parent's"


def _changed_fields(
    config: dict[str, Any], parent: dict[str, Any], arch: Architecture, moved: Collection[str]
) -> list[str]:
    """What is carried over from the parent's config and is not the same."""
    text = arch.text_config(parent)
    before = {key: text[key] for key in deepseek.COPIED_CONFIG_KEYS if key in text}
    before["rope_theta"] = float(rope_sets(parent, arch)[0].parameters["rope_theta"])
    after = {**config, "rope_theta": float(config["rope_parameters"]["rope_theta"])}
    return [key for key, value in before.items() if key not in moved and after.get(key) != value]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
