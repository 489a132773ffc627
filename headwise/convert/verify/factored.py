"""Check an MLA folder: its stock attention against its factors in float64, and against the parent's attention.

The inputs of every layer are those that the folder's own model, or the parent, computes on text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.convert.mla.exact import exact_mla_shape
from headwise.convert.positions.context import rope_sets
from headwise.convert.verify.layer_inputs import (
    StockAttention,
    attention_inputs,
    check_tokens,
    relative_error,
    within_budget,
)
from headwise.convert.verify.normed import NormedAttention, compare_reduced
from headwise.convert.verify.rounded import holds_chunks, rounds_weights
from headwise.convert.verify.whole_model import compare_logits
from headwise.io.reader import Checkpoint
from headwise.models import deepseek, mla_source
from headwise.models.layout import LatentWeights, from_planes, to_planes
from headwise.models.protocol import AttentionModel, find_attention_model, latent_model, read_latent_layer
from headwise.models.stock import stock_config

# The linear norm is off by 1e-8 for a token of ordinary size (mathematics, section 7c). An exact conversion is
# rounded once to the folder's dtype.
TOLERANCE = 1e-5
EXACT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def latent_attention(weights: LatentWeights, x: Tensor, o_bias: Tensor | None = None) -> Tensor:
    """Return the causal attention of an MLA layer from its factors, (batch, tokens, D) float64.

    Args:
        weights: the factors, norm-free.
        x: inputs, (batch, tokens, D) float64.
        o_bias: (D,), or None.
    """
    inputs = x
    if weights.kv_down.shape[1] > x.shape[-1]:
        inputs = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    angles = positions[:, None] * weights.frequencies.double()
    turned = torch.polar(torch.ones_like(angles), angles).T  # (planes, tokens)

    def rotate(vectors: Tensor) -> Tensor:  # (..., P, tokens)
        return from_planes(to_planes(vectors, vectors.shape[-2]) * turned)

    columns = inputs.mT[:, None]  # (batch, 1, inputs, tokens)
    latent_rows = weights.kv_down @ inputs.mT  # (batch, R, tokens)
    keys = weights.k_up @ latent_rows[:, None]
    scores = (weights.q_nope @ columns).mT @ keys
    scores = scores + rotate(weights.q_rope @ columns).mT @ rotate(weights.k_rope @ inputs.mT)[:, None]
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    attention = (weights.scale * scores).masked_fill(future, -torch.inf).softmax(-1)
    values = (weights.v_up @ latent_rows[:, None]).mT
    output = torch.einsum("bhtv,hdv->btd", attention @ values, weights.o)
    return output if o_bias is None else output + o_bias.to(output)


class FactoredAttention:
    """Evaluate the attention of single layers from the factors of an MLA folder, without its norm, in float64.

    Args:
        checkpoint: the folder.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, layer: int, inputs: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Return the outputs of one layer, (sequences, tokens, D) float64.

        Args:
            layer: its index.
            inputs: (sequences, tokens, D) float64.
            tensors: of the layer's attention as the folder has them; None: they are read.
        """
        weights, o_bias = read_latent_layer(self._checkpoint, layer, inputs.device, tensors)
        return latent_attention(weights, inputs, o_bias)


def latent_reference(checkpoint: Checkpoint) -> FactoredAttention | NormedAttention:
    """Return the evaluation in float64 of an MLA folder's attention: without norms where they are linear.

    Args:
        checkpoint: the folder.
    """
    model = latent_model(checkpoint.config)
    return FactoredAttention(checkpoint) if model.linear else NormedAttention(checkpoint, model)


def check_factors(
    checkpoint: Checkpoint, model: AttentionModel, device: torch.device | str = "cpu"
) -> tuple[bool, str]:
    """Compare the stock attention, latent norm included, with the factors without a norm, in every layer.

    Args:
        checkpoint: the MLA folder.
        model: its stock class.
        device: where the layers run that compute the inputs.

    Returns:
        Whether they agree, and the measured errors in words.
    """
    attention, factored = StockAttention(checkpoint.config, model), latent_reference(checkpoint)
    stock = model.stock_config(checkpoint.config)
    tokens = check_tokens(checkpoint, stock.vocab_size)
    tokens = within_budget(tokens, model.layouts(checkpoint.config))
    worst, worst_layer, bend = 0.0, 0, 0.0
    for layer, x, _, tensors in attention_inputs(checkpoint, model, tokens, device):
        error = relative_error(attention(layer, tensors, x), factored(layer, x, tensors))
        if not error <= worst:
            worst, worst_layer = error, layer
        bend = max(bend, _norm_bend(tensors, model.attention_path(layer), checkpoint.config["kv_lora_rank"], x))
    num_layers = stock.num_hidden_layers
    if not latent_model(checkpoint.config).linear:
        return worst < TOLERANCE, (
            f"attention of all {num_layers} layers within {worst:.1e} of its tensors in float64 (layer "
            f"{worst_layer}), limit {TOLERANCE:.0e}, on the model's own inputs"
        )
    detail = (
        f"attention of all {num_layers} layers within {worst:.1e} of its factors (layer {worst_layer}), "
        f"limit {TOLERANCE:.0e}, on the model's own inputs; the latent's mean square is at most {2 * bend:.1e} of "
        "the norm's epsilon"
    )
    return worst < TOLERANCE, detail


def _norm_bend(tensors: dict[str, Tensor], path: str, rank: int, x: Tensor) -> float:
    """Return the largest relative error of the linear latent norm: mean square over twice epsilon."""
    prefix = f"{path}.kv_a_proj_with_mqa"
    latent = x @ tensors[f"{prefix}.weight"][:rank].to(x).T
    if f"{prefix}.bias" in tensors:
        latent = latent + tensors[f"{prefix}.bias"][:rank].to(x)
    return float(latent.square().mean(-1).max()) / (2 * deepseek.NORM_EPS)


def compare_with_parent(
    checkpoint: Checkpoint,
    parent: Checkpoint,
    model: AttentionModel,
    *,
    compare: bool,
    trained: bool,
    device: torch.device | str = "cpu",
) -> tuple[bool, str]:
    """Compare what is not attention with the parent's tensors, and an exact conversion with the parent's attention.

    Args:
        checkpoint: the MLA folder.
        parent: the model that it was converted from, with the folder's context and window.
        model: the folder's stock class.
        compare: compare the tensors too that are copied byte for byte.
        trained: whether the folder was trained since; only its shape is then the parent's.
        device: where models and their layers run.
    """
    arch = find_attention_model(parent.config, parent.tensors)
    before, after = arch.layouts(parent.config), model.layouts(checkpoint.config)
    if before[0].kind == "mla" and after[0].indexer is None:
        return compare_reduced(checkpoint, parent, latent_model(checkpoint.config), trained)
    if len(before) != len(after):
        return False, f"the parent has {len(before)} layers, and the folder {len(after)}"
    changed = _changed_fields(checkpoint.config, parent.config, arch)
    if changed:
        return False, f"config.json differs from the parent's in {', '.join(changed)}"
    if trained:
        return True, "the parent's shape and configuration; its weights were trained since"
    dtype = next(iter(checkpoint.tensors.values())).dtype
    rule = mla_source.find_mla_source(arch.text_config(parent.config), dtype)
    attention_names = [n for n in parent.tensors if f".{arch.attention}." in n]
    for carried in mla_source.plan_scaled_copies(rule, parent.tensors, attention_names):
        known = not compare and carried.keeps_bytes(parent.tensors[carried.source], dtype)
        if carried.name not in checkpoint.tensors or not (
            known or holds_chunks(checkpoint, carried.name, carried.chunks(parent, dtype))
        ):
            return False, f"{carried.name} is not what the parent's {carried.source} becomes"
    largest = [max(sizes) for sizes in zip(*map(exact_mla_shape, before), strict=True)]
    shape = after[0]
    linear = arch.qk_norm(parent.config) is None
    if rounds_weights(checkpoint):
        return True, "outside attention, every tensor is what the parent's becomes, some rounded to FP8"
    if not linear or (shape.kv_lora_rank or 0) < largest[0] or shape.rotary_dim < largest[1]:
        return True, "outside attention, every tensor is what the parent's becomes"
    attention, factored = StockAttention(parent.config, arch), FactoredAttention(checkpoint)
    tokens = within_budget(check_tokens(parent, arch.stock_config(parent.config).vocab_size), before)
    worst, worst_layer = 0.0, 0
    for layer, x, _, tensors in attention_inputs(parent, arch, tokens, device):
        expected = attention(layer, tensors, x)
        # The folder's residual stream, and with it the attention output, may have another scale.
        error = relative_error(factored(layer, x) / rule.factors["residual"], expected)
        if not error <= worst:
            worst, worst_layer = error, layer
    limit = EXACT_TOLERANCE.get(dtype, 3e-2)
    agree, logits = compare_logits(checkpoint, parent, model, arch, recomputed=True, device=device)
    detail = f"attention of all layers within {worst:.1e} of the parent's (layer {worst_layer}), limit {limit:.0e}"
    return worst < limit and agree, f"exact: {detail}{logits}"


def _changed_fields(config: dict[str, Any], parent: dict[str, Any], arch: AttentionModel) -> list[str]:
    """Return the copied config fields that differ from the parent's."""
    stock = arch.stock_config(parent).to_dict()
    before = {key: stock[key] for key in deepseek.COPIED_CONFIG_KEYS if key in stock}
    before["rope_theta"] = float(rope_sets(parent, arch)[0].parameters["rope_theta"])
    after = {**stock_config(config).to_dict(), "rope_theta": float(config["rope_parameters"]["rope_theta"])}
    return [key for key, value in before.items() if after.get(key) != value]
