"""Parent and child on the same tokens: their next-token distributions, and what happens layer by layer.

Both models are in memory; of their activations only those of one layer are, at any time. The layers are run one by
one on what the models themselves hand them (masks, rotary tables), parent and child in step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.eval.result import Diagnostics, Entropy, Head, Layer
from headwise.models.norm_free import ATTENTION
from headwise.models.stock import Stop, recorded
from headwise.progress import SILENT, Progress

# Positions whose distributions are compared at once: bounds memory for large vocabularies.
POSITIONS = 256
# An entropy below the first share of the most possible: one token gets nearly all; above the second: all get alike.
COLLAPSED, UNIFORM = 0.02, 0.98
CHANGED = 0.1


@dataclass(frozen=True)
class Seen:
    """One layer at work: its output and its attention's, (1, T, D), and its attention weights, (heads, T, T)."""

    hidden: Tensor
    attention: Tensor
    weights: Tensor | None


@torch.inference_mode()
def diagnose(
    child: Any,
    parent: Any,
    blocks: Tensor,
    *,
    layer_blocks: int,
    child_stock: Any = None,
    parent_stock: Any = None,
    progress: Progress = SILENT,
) -> Diagnostics:
    """Compare two models on blocks of tokens.

    Args:
        child, parent: loaded with eager attention.
        blocks: (blocks, length).
        layer_blocks: how many of them are also followed through the layers.
        child_stock, parent_stock: where the layers are (`Model.stock`); None: they are not looked at.
    """
    progress.stage("parent and child", total=len(blocks) + layer_blocks, unit="blocks")
    divergence, first, five = [], [], []
    for block in blocks.split(1):
        ours, theirs = (
            model(input_ids=block.to(model.device), use_cache=False).logits[0, :-1] for model in (child, parent)
        )
        for own, other in zip(ours.split(POSITIONS), theirs.to(ours.device).split(POSITIONS), strict=True):
            a, b = own.float().log_softmax(-1), other.float().log_softmax(-1)
            # Rounding can leave a divergence of like distributions a hair below zero.
            divergence.append((b.exp() * (b - a)).sum(-1).clamp_min(0).cpu())
            top, parents_top = own.topk(5).indices, other.topk(5).indices
            first.append((top[:, 0] == parents_top[:, 0]).cpu())
            five.append((parents_top[:, :, None] == top[:, None]).any(-1).double().mean(-1).cpu())
        progress.advance(1)
    kl = torch.cat(divergence).double()
    by_block = kl.unflatten(0, (len(blocks), -1)).mean(1)
    layers: tuple[Layer, ...] = ()
    entropy = None
    if child_stock is not None and parent_stock is not None:
        layers, entropy = _layers(child, parent, child_stock, parent_stock, blocks[:layer_blocks], progress)
    return Diagnostics(
        tokens=len(kl),
        kl=float(kl.mean()),
        kl_standard_error=float(by_block.std()) / math.sqrt(len(blocks)) if len(blocks) > 1 else None,
        kl_p99=float(kl.quantile(0.99)) if len(kl) < 10_000_000 else float(kl.sort().values[int(0.99 * len(kl))]),
        top1=float(torch.cat(first).double().mean()),
        top5=float(torch.cat(five).mean()),
        layers=layers,
        entropy=entropy,
    )


def walk(model: Any, stock: Any, block: Tensor) -> Iterator[Seen]:
    """A model's decoder layers at work on one block (1, T), one after another."""
    stack = model.get_submodule(stock.module.rpartition(".")[0])
    with recorded(stack) as stubs, suppress(Stop):
        model.base_model(input_ids=block.to(model.device), use_cache=False)
    hidden = stubs[0].hidden
    for stub in stubs:
        kept: dict[str, Any] = {}

        def keep(module: Any, args: Any, output: Any, kept: dict[str, Any] = kept) -> None:
            kept["output"], kept["weights"] = output[0], output[1]

        attention = stub.layer.get_submodule(getattr(stock, "attention", ATTENTION))
        handle = attention.register_forward_hook(keep)
        try:
            output = stub.layer(hidden, *stub.args, **stub.kwargs)
        finally:
            handle.remove()
        hidden = output[0] if isinstance(output, tuple) else output
        weights = kept["weights"]
        yield Seen(hidden, kept["output"], None if weights is None else weights[0])


def head_entropy(weights: Tensor) -> Tensor:
    """Mean attention entropy of each head as a share of the most it can be.

    Args:
        weights: (heads, queries, keys), causal.

    Returns:
        (heads,): the mean over queries of H(p) / log(number of keys that the query may see). Queries that see few
        keys are left out: there every head is sharp.
    """
    weights = weights.double()
    length = weights.shape[-1]
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    # A window shows a query fewer keys than there are before it.
    visible = torch.arange(1, length + 1, device=weights.device).minimum((weights > 0).any(0).sum(-1).clamp_min(2))
    start = min(16, length // 2)
    return (entropy / visible.double().log().clamp_min(math.log(2)))[:, start:].mean(-1)


def _layers(
    child: Any, parent: Any, child_stock: Any, parent_stock: Any, blocks: Tensor, progress: Progress
) -> tuple[tuple[Layer, ...], Entropy | None]:
    wide = [model.config.get_text_config() for model in (child, parent)]
    if len({(c.num_hidden_layers, c.hidden_size) for c in wide}) > 1:
        return (), None
    depth = wide[0].num_hidden_layers
    squares = torch.zeros(2, depth, 3, dtype=torch.float64)
    entropies: list[list[Tensor]] = [[], []]
    for block in blocks.split(1):
        pairs = zip(walk(child, child_stock, block), walk(parent, parent_stock, block), strict=True)
        for layer, (own, other) in enumerate(pairs):
            for row, (a, b) in enumerate(((own.hidden, other.hidden), (own.attention, other.attention))):
                a, b = a.double(), b.to(a.device).double()
                squares[row, layer] += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).cpu()
            if own.weights is not None and other.weights is not None:
                for side, seen in zip(entropies, (own.weights, other.weights), strict=True):
                    side.append(head_entropy(seen).cpu())
        progress.advance(1)
    inner, own_square, other_square = squares.unbind(-1)
    errors = (1 - inner.square() / (own_square * other_square).clamp_min(1e-300)).clamp_min(0).sqrt().tolist()
    layers = tuple(Layer(i, hidden, attention) for i, (hidden, attention) in enumerate(zip(*errors, strict=True)))
    if len(entropies[0]) < depth * len(blocks) or entropies[0][0].shape != entropies[1][0].shape:
        return layers, None
    ours, theirs = (torch.stack(side).unflatten(0, (len(blocks), depth)).mean(0) for side in entropies)
    return layers, _entropy(ours, theirs)


def _entropy(child: Tensor, parent: Tensor) -> Entropy:
    def heads(mask: Tensor) -> tuple[Head, ...]:
        return tuple(Head(layer, head) for layer, head in mask.nonzero().tolist())

    return Entropy(
        child=tuple(map(tuple, child.tolist())),
        parent=tuple(map(tuple, parent.tolist())),
        collapsed=heads((child < COLLAPSED) & (parent >= COLLAPSED)),
        uniform=heads((child > UNIFORM) & (parent <= UNIFORM)),
        parent_collapsed=heads(parent < COLLAPSED),
        parent_uniform=heads(parent > UNIFORM),
        changed=heads((child - parent).abs() > CHANGED),
        collapsed_below=COLLAPSED,
        uniform_above=UNIFORM,
        changed_by=CHANGED,
    )
