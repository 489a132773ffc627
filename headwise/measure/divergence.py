"""Compare a child with its parent on the same tokens: next-token distributions, layer outputs, attention entropy.

Both models are in memory, but only the activations of one layer at a time. The layers of both run in step, each on
the masks and rotary tables that the stock model computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.measure.entropy import AttentionEntropy, compare_entropy, relative_entropy
from headwise.measure.image_prompts import ImagePrompt, ImagePrompts
from headwise.models.protocol import AttentionModel
from headwise.models.stock import StopForward, capture_layer_calls
from headwise.progress import SILENT, Progress

# Positions compared at once: bounds the memory that large vocabularies need.
POSITIONS_AT_ONCE = 256
# torch.quantile accepts at most 2**24 elements.
QUANTILE_LIMIT = 10_000_000


@dataclass(frozen=True)
class LayerError:
    """Relative error of one layer of the child, on the inputs that each model computes itself.

    The error is min over scalars c of ||c child - parent|| / ||parent||, over all tokens. The factor c is free
    because norms remove it; MLA folders scale their residual stream. Errors of earlier layers are included.

    Attributes:
        layer: index of the layer.
        hidden: error of the residual stream behind the layer.
        attention: error of the attention output.
    """

    layer: int
    hidden: float
    attention: float


@dataclass(frozen=True)
class Divergence:
    """Differences of child and parent on the same tokens.

    Attributes:
        tokens: number of predictions compared.
        kl: mean KL(parent || child) of the next-token distributions, nats.
        kl_standard_error: standard error of `kl` over blocks of text; None for one block.
        kl_p99: 99th percentile of the KL divergence over tokens, nats.
        top1: share of predictions with the same most likely token.
        top5: mean share of the parent's five most likely tokens that are among the child's five.
        layers: errors of each layer with attention that the text runs through; empty where the models differ in
            depth or width.
        entropy: None where the stock class returns no attention weights, the models differ in heads, or layers are
            left out.
    """

    tokens: int
    kl: float
    kl_standard_error: float | None
    kl_p99: float
    top1: float
    top5: float
    layers: tuple[LayerError, ...] = ()
    entropy: AttentionEntropy | None = None


@dataclass(frozen=True)
class LayerOutputs:
    """Outputs of one decoder layer on one block.

    Attributes:
        layer: index of the layer.
        hidden: residual stream behind the layer, (1, T, D).
        attention: attention output, (1, T, D).
        weights: attention probabilities, (heads, T, T); None where the stock class returns none.
    """

    layer: int
    hidden: Tensor
    attention: Tensor
    weights: Tensor | None


@torch.inference_mode()
def measure_divergence(
    child: Any,
    parent: Any,
    blocks: Tensor | ImagePrompts,
    *,
    num_layer_blocks: int = 0,
    child_architecture: AttentionModel | None = None,
    parent_architecture: AttentionModel | None = None,
    progress: Progress = SILENT,
) -> Divergence:
    """Compare two models on blocks of tokens.

    Args:
        child: the converted model, loaded with eager attention.
        parent: the original model, loaded with eager attention.
        blocks: token ids, (blocks, length); or prompts with images, of which the text is predicted.
        num_layer_blocks: number of blocks whose layer outputs are compared too; 0 for prompts with images.
        child_architecture: where the child's layers and attention are; None: layers are not compared.
        parent_architecture: where the parent's layers and attention are; None: layers are not compared.
        progress: receives the stage "parent and child".

    Returns:
        The differences.
    """
    progress.stage("parent and child", total=len(blocks) + num_layer_blocks, unit="blocks")
    kl_parts, top1_parts, top5_parts, sizes = [], [], [], []
    for block in blocks.split(1) if isinstance(blocks, Tensor) else blocks:
        child_logits, parent_logits = (_predictions(model, block) for model in (child, parent))
        sizes.append(len(child_logits))
        for q, p in zip(
            child_logits.split(POSITIONS_AT_ONCE),
            parent_logits.to(child_logits.device).split(POSITIONS_AT_ONCE),
            strict=True,
        ):
            log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
            # Rounding can make the divergence of equal distributions slightly negative.
            kl_parts.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).cpu())
            child_top, parent_top = q.topk(5).indices, p.topk(5).indices
            top1_parts.append((child_top[:, 0] == parent_top[:, 0]).cpu())
            top5_parts.append((parent_top[:, :, None] == child_top[:, None]).any(-1).double().mean(-1).cpu())
        progress.advance(1)
    kl = torch.cat(kl_parts).double()
    # Prompts may differ in length: the linearised ratio of the sums of nats and tokens.
    rest = torch.stack([part.sum() - kl.mean() * len(part) for part in kl.split(sizes)]) * len(sizes) / len(kl)
    layers: tuple[LayerError, ...] = ()
    entropy = None
    if num_layer_blocks and child_architecture is not None and parent_architecture is not None:
        assert isinstance(blocks, Tensor)
        layers, entropy = _compare_layers(
            (child, child_architecture), (parent, parent_architecture), blocks[:num_layer_blocks], progress
        )
    return Divergence(
        tokens=len(kl),
        kl=float(kl.mean()),
        kl_standard_error=float(rest.std()) / math.sqrt(len(rest)) if len(rest) > 1 else None,
        kl_p99=float(kl.quantile(0.99))
        if len(kl) < QUANTILE_LIMIT
        else float(kl.sort().values[int(0.99 * len(kl))]),
        top1=float(torch.cat(top1_parts).double().mean()),
        top5=float(torch.cat(top5_parts).mean()),
        layers=layers,
        entropy=entropy,
    )


def _predictions(model: Any, block: Tensor | ImagePrompt) -> Tensor:
    """Return the logits of the predicted tokens of a block, or of a prompt's text, (tokens, vocabulary)."""
    if isinstance(block, ImagePrompt):
        logits: Tensor = model(**block.model_inputs(model), use_cache=False).logits
        return logits[0, :-1][block.text[1:].to(logits.device)]
    logits = model(input_ids=block.to(model.device), use_cache=False).logits
    return logits[0, :-1]


def iter_layer_outputs(model: Any, architecture: AttentionModel, block: Tensor) -> Iterator[LayerOutputs]:
    """Run the decoder layers of a model on one block, one layer after another.

    Args:
        model: a stock model.
        architecture: where its decoder layers and their attention are.
        block: token ids, (1, T).

    Yields:
        The outputs of each layer with attention. A layer that text alone does not run, such as cross-attention to
        an image, is left out.
    """
    stack = model.get_submodule(architecture.module.rpartition(".")[0])
    with capture_layer_calls(stack) as stubs, suppress(StopForward):
        model.base_model(input_ids=block.to(model.device), use_cache=False)
    hidden = stubs[0].hidden
    for layer, stub in enumerate(stubs):
        if not stub.was_called:
            continue
        attention = getattr(stub.layer, architecture.attention, None)
        if attention is None:
            output = stub.layer(hidden, *stub.args, **stub.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            continue
        captured: list[tuple[Tensor, Tensor | None]] = []
        handle = attention.register_forward_hook(
            lambda module, args, output, captured=captured: captured.append((output[0], output[1]))
        )
        try:
            output = stub.layer(hidden, *stub.args, **stub.kwargs)
        finally:
            handle.remove()
        hidden = output[0] if isinstance(output, tuple) else output
        attention_output, weights = captured[-1]
        yield LayerOutputs(layer, hidden, attention_output, None if weights is None else weights[0])


def _compare_layers(
    child: tuple[Any, Any], parent: tuple[Any, Any], blocks: Tensor, progress: Progress
) -> tuple[tuple[LayerError, ...], AttentionEntropy | None]:
    """Compare layer outputs and attention entropy of two (model, architecture) pairs."""
    configs = [model.config.get_text_config() for model, _ in (child, parent)]
    if len({(config.num_hidden_layers, config.hidden_size) for config in configs}) > 1:
        return (), None
    depth = configs[0].num_hidden_layers
    # Per output and layer: <child, parent>, ||child||^2, ||parent||^2.
    products = torch.zeros(2, depth, 3, dtype=torch.float64)
    compared = [False] * depth
    child_entropies: list[Tensor] = []
    parent_entropies: list[Tensor] = []
    for block in blocks.split(1):
        pairs = zip(iter_layer_outputs(*child, block), iter_layer_outputs(*parent, block), strict=True)
        for ours, theirs in pairs:
            layer = ours.layer
            compared[layer] = True
            outputs = ((ours.hidden, theirs.hidden), (ours.attention, theirs.attention))
            for row, (a, b) in enumerate(outputs):
                a, b = a.double(), b.to(a.device).double()
                products[row, layer] += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).cpu()
            if ours.weights is not None and theirs.weights is not None:
                child_entropies.append(relative_entropy(ours.weights).cpu())
                parent_entropies.append(relative_entropy(theirs.weights).cpu())
        progress.advance(1)
    inner, child_square, parent_square = products.unbind(-1)
    errors = (1 - inner.square() / (child_square * parent_square).clamp_min(1e-300)).clamp_min(0).sqrt().tolist()
    layers = tuple(LayerError(i, *pair) for i, pair in enumerate(zip(*errors, strict=True)) if compared[i])
    if len(child_entropies) < depth * len(blocks) or child_entropies[0].shape != parent_entropies[0].shape:
        return layers, None
    child_mean, parent_mean = (
        torch.stack(entropies).unflatten(0, (len(blocks), depth)).mean(0)
        for entropies in (child_entropies, parent_entropies)
    )
    return layers, compare_entropy(child_mean, parent_mean)
