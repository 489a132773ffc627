"""Check the indexers of a folder with sparse attention: the stock class selects the keys of the best scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.convert.sparse.indexer import index_scores, query_scale, read_indexer
from headwise.convert.verify.layer_inputs import TOKENS, StockAttention, attention_inputs, check_tokens
from headwise.io.reader import Checkpoint
from headwise.models.deepseek import NORM_EPS, ROTATED, interleaved_rows
from headwise.models.mla_source import written_class
from headwise.models.protocol import AttentionModel, read_latent_layer
from headwise.models.stock import move_to_device

# The budget of the check, which is smaller than the text; and the largest difference of scores, relative to the
# largest score of a query. The stock class computes scores in float32, and its norm is linear within 1e-5.
BUDGET, TOLERANCE = TOKENS // 3, 1e-3


def check_selection(
    checkpoint: Checkpoint, model: AttentionModel, device: torch.device | str = "cpu"
) -> tuple[bool, str]:
    """Compare the keys that the stock indexers select with the scores of the weights in float64, in every layer.

    Args:
        checkpoint: the folder.
        model: its stock class.
        device: where the layers run that compute the inputs.

    Returns:
        Whether they agree, and the measured errors in words.
    """
    attention = StockAttention(checkpoint.config, model)
    tokens = check_tokens(checkpoint, checkpoint.config["vocab_size"])
    worst, worst_layer = 0.0, 0
    layouts, stock = model.layouts(checkpoint.config), written_class(checkpoint.config)
    heads, rotary = checkpoint.config["index_n_heads"], layouts[0].rotary_dim
    for layer, inputs, _, own in attention_inputs(checkpoint, model, tokens, device):
        if layouts[layer].own_indexer is None:
            continue
        x = inputs.cpu()
        tensors, path = move_to_device(own, x.device), model.attention_path(layer)
        scale = query_scale(tensors, path, NORM_EPS)
        frequencies = read_latent_layer(checkpoint, layer, x.device, tensors)[0].frequencies
        halves = tensors
        if stock is not None and stock.interleaved:
            halves = {n: _halves(n, tensor, heads, rotary) for n, tensor in tensors.items()}
        scores = index_scores(read_indexer(halves, path, heads, scale, frequencies), x)
        error = _shortfall(scores, _selected(attention, layer, tensors, x))
        if not error <= worst:
            worst, worst_layer = error, layer
    detail = (
        f"with a budget of {BUDGET}, the scores of the keys that the stock indexers select are within {worst:.1e} "
        f"of the best (layer {worst_layer}), limit {TOLERANCE:.0e}"
    )
    return worst < TOLERANCE, detail


def _halves(name: str, tensor: Tensor, heads: int, rotary: int) -> Tensor:
    """Return a tensor of an indexer for RoPE that rotates the two halves, in place of neighbouring elements."""
    return interleaved_rows(name, tensor, heads, rotary, back=True) if name.endswith(ROTATED) else tensor


def _selected(attention: StockAttention, layer: int, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the tokens that the stock indexer of a layer selects, (sequences, tokens, BUDGET)."""
    found: list[Tensor] = []
    indexer: Any = attention.module(layer).get_submodule("indexer")
    indexer.index_topk = BUDGET
    handle = indexer.register_forward_hook(lambda _, __, output: found.append(output.long()))
    try:
        attention(layer, tensors, x)
    finally:
        handle.remove()
    return found[0]


def _shortfall(scores: Tensor, selected: Tensor) -> float:
    """Return by how much the worst selected score is below the worst of the best, relative to the largest score.

    Args:
        scores: (sequences, tokens, tokens) of queries on keys.
        selected: (sequences, tokens, BUDGET) indices of the selected keys.

    Returns:
        The largest value over all queries; infinite if a query selects fewer keys than it could.
    """
    index = torch.arange(scores.shape[-1])
    past = index <= index[:, None]
    scores = scores.masked_fill(~past, -torch.inf)
    own = scores.gather(-1, selected).sort(-1, descending=True).values
    best = scores.topk(selected.shape[-1], dim=-1).values
    finite = best.isfinite()
    size = scores.masked_fill(~past, 0).abs().amax(-1, keepdim=True).clamp_min(1e-300)
    difference = ((best - own) / size).masked_fill(~finite, 0)
    return float(difference.max()) if bool((own.isfinite() == finite).all()) else float("inf")
