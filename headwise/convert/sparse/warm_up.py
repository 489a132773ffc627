"""Train the indexer of one layer on the attention of that layer: the dense warm-up of DeepSeek-V3.2.

All other weights are frozen. The loss is the KL divergence of the layer's attention, summed over heads and
normalised, from the softmax of the index scores (DeepSeek-AI 2025, arXiv 2512.02556, section 2.1). The attention is
flattened by a power before: the worst keys of a budget get little attention, and the loss would hardly depend on
them.
The inputs are the parent's inputs of the layer on long text, so that one layer is all that is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.refit.regression import HELD_BACK, schedule
from headwise.convert.sparse.closed_form import initial_indexer
from headwise.convert.sparse.indexer import (
    IndexerWeights,
    index_scores,
    indexer_tensors,
    query_scale,
    rotate,
    select,
)
from headwise.models import deepseek, rope
from headwise.models.deepseek import ATTENTION, LAYERS
from headwise.models.layout import AttentionLayout, IndexerShape, LatentWeights

INDEX_STEPS = 300
# Queries of a sequence in one step: they bound the memory of the scores, which are taken on all tokens.
QUERIES = 128
# Peak learning rate relative to the root mean square of each tensor, and the power of the attention in the loss.
LEARNING_RATE, POWER = 0.003, 0.5
# Queries and sequences on which the closed form chooses its two numbers, and on which the result is measured.
SAMPLES = 4
OFFSETS, SIZES = (2.0, 4.0, 6.0, 9.0), (0.125, 0.25, 0.5, 1.0)
# The budget of keys of the recall in the report, as a share of the sequence.
SHARE = 8


@dataclass(frozen=True)
class IndexerReport:
    """How well an indexer predicts the attention of its layer, on held-back sequences.

    Attributes:
        steps: of training.
        kl_before: the loss of the closed form, in nats per query.
        kl_after: of the trained indexer.
        recall_before: the share of the attention on the keys that the closed form selects, an eighth of the
            sequence.
        recall_after: that of the trained indexer.
        recall_best: that of the keys with the most attention.
        kept: whether the trained indexer is used; False where its recall is not above that of the closed form.
    """

    steps: int
    kl_before: float
    kl_after: float
    recall_before: float
    recall_after: float
    recall_best: float
    kept: bool


def summed_attention(latent: LatentWeights, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention of queries, mean over heads, and the logarithms of the heads' partition functions.

    Args:
        latent: the layer, in the dtype and on the device of `x`.
        x: (tokens, D) inputs of the attention.
        positions: (queries,) of the queries.

    Returns:
        (queries, tokens) and (H, queries).
    """
    tokens = torch.arange(len(x), device=x.device)
    biased = latent.kv_down.shape[1] > x.shape[1]
    inputs = torch.cat([x, torch.ones_like(x[:, :1])], -1) if biased else x
    own = inputs[positions]
    latent_rows = inputs @ latent.kv_down.T
    queries = torch.einsum("hnr,htn->htr", latent.k_up, own @ latent.q_nope.mT)
    scores = queries @ latent_rows.T
    keys = rotate(inputs @ latent.k_rope.T, latent.frequencies, tokens)
    scores = scores + rotate(own @ latent.q_rope.mT, latent.frequencies, positions) @ keys.T
    scores = (latent.scale * scores).masked_fill(tokens > positions[:, None], -torch.inf)
    partition = scores.logsumexp(-1)
    return (scores - partition[..., None]).exp().mean(0), partition


def make_indexer(
    config: Mapping[str, Any],
    shape: IndexerShape,
    layer: int,
    tensors: Mapping[str, Tensor],
    record: LayerRecord,
    *,
    steps: int,
    seed: int,
    device: torch.device | str,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a layer's indexer, and a report.

    Args:
        config: config.json of the output.
        shape: of the indexer.
        layer: index of the layer.
        tensors: of the layer's attention, by their names in the output.
        record: the inputs of the parent's attention, and their moment.
        steps: of training.
        seed: of the choice of queries; the index of the layer is added.
        device: where the indexer is trained.
    """
    prefix = f"{LAYERS.format(layer=layer)}.{ATTENTION}"
    frequencies, _ = rope.frequencies(
        config["rope_parameters"], config["qk_rope_head_dim"], config["max_position_embeddings"]
    )
    latent = deepseek.read_attention(tensors, prefix, config, frequencies)
    assert record.inputs is not None
    trained, report = train_indexer(
        latent, shape, record.moment, record.inputs, steps=steps, seed=seed + layer, device=device
    )
    dtype = tensors[f"{prefix}.kv_b_proj.weight"].dtype
    scale = query_scale(tensors, prefix, deepseek.NORM_EPS)
    moment = record.moment[:-1, :-1].cpu()
    return indexer_tensors(trained, prefix, scale, moment=moment, dtype=dtype), asdict(report)


def train_indexer(
    latent: LatentWeights,
    shape: IndexerShape,
    moment: Tensor,
    inputs: Tensor,
    *,
    steps: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[IndexerWeights, IndexerReport]:
    """Make the closed form of an indexer, and train it.

    Args:
        latent: the MLA layer.
        shape: of the indexer.
        moment: (D + 1, D + 1) second moment of the inputs with a constant 1 appended, float64.
        inputs: (sequences, tokens, D) of the attention; the last of them are held back where there are two or more.
        steps: of Adam, on `QUERIES` queries of one sequence each.
        seed: of the choice of queries.
        device: where the indexer is trained.

    Returns:
        The indexer, float64 on the CPU, and its errors.
    """
    generator = torch.Generator().manual_seed(seed)
    held = max(1, round(HELD_BACK * len(inputs)))
    train = inputs[: len(inputs) - held] if len(inputs) > held else inputs
    teacher = latent.to_device(device).to(torch.float32)
    measured = [_batch(teacher, x, generator, device) for x in inputs[-held:].repeat(SAMPLES, 1, 1)[:SAMPLES]]
    first = [_batch(teacher, x, generator, device) for x in train[:SAMPLES]]
    partition = torch.stack([batch.partition.mean(-1) for batch in first]).mean(0).double().cpu()
    start = _best_start(latent, shape, moment.cpu(), partition, first)
    trained = start.to(torch.float32, device)
    before = _measure(trained, measured)
    names = ("queries", "keys", "key_bias", "weights")
    parameters = {name: getattr(trained, name).clone().requires_grad_() for name in names}
    trained = replace(trained, **parameters)
    optimizer = torch.optim.Adam(
        [
            {"params": [p], "lr": LEARNING_RATE * float(p.detach().square().mean().sqrt())}
            for p in parameters.values()
        ],
        betas=(0.9, 0.95),
        eps=1e-12,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for _ in range(steps):
        batch = _batch(teacher, train[int(torch.randint(len(train), (), generator=generator))], generator, device)
        optimizer.zero_grad()
        _kl(index_scores(trained, batch.x, batch.positions)[0], batch).backward()
        for name in ("keys", "key_bias"):  # the last element of a key is the constant
            parameters[name].grad[-1] = 0
        optimizer.step()
        rates.step()
    after = _measure(trained, measured)
    kept = after[1] > before[1]  # False for NaN
    best = replace(trained, **{n: p.detach() for n, p in parameters.items()}).to(torch.float64) if kept else start
    report = IndexerReport(steps, before[0], after[0], before[1], after[1], before[2], kept)
    return replace(best, frequencies=start.frequencies), report


def indexer_flops(layout: AttentionLayout, hidden_size: int, length: int, steps: int) -> float:
    """Return the floating-point operations of making the indexer of one layer.

    Args:
        layout: of the layer.
        hidden_size: of the model.
        length: tokens in a sequence.
        steps: of training, of which each takes three times a forward pass.
    """
    shape = layout.indexer
    assert shape is not None
    row, heads, width = layout.key_value_elements, shape.index_n_heads, shape.index_head_dim
    teacher = 2.0 * length * row * (hidden_size + QUERIES * layout.num_attention_heads)
    indexer = 2.0 * length * width * (hidden_size + QUERIES * heads) + 2.0 * QUERIES * heads * width * hidden_size
    measured = len(OFFSETS) * SAMPLES + 2 * SAMPLES
    return steps * (teacher + 3 * indexer) + measured * indexer + 2 * SAMPLES * teacher


def indexer_bytes(layout: AttentionLayout, hidden_size: int, length: int) -> int:
    """Return the bytes that the training of one layer's indexer takes at its peak.

    Args:
        layout: of the layer.
        hidden_size: of the model.
        length: tokens in a sequence.
    """
    shape = layout.indexer
    assert shape is not None
    # Scores of queries on keys: before and after ReLU, and gradients; the teacher's, two at a time; the start's.
    scores = 4 * QUERIES * length * (4 * shape.index_n_heads + 2 * layout.num_attention_heads + SAMPLES)
    batches = 2 * SAMPLES * 4 * length * (hidden_size + 2 * QUERIES)
    # Two closed forms in float64; weights, gradients and the averages of Adam in float32.
    return scores + batches + 48 * shape.num_parameters(hidden_size)


@dataclass(frozen=True)
class _Batch:
    """Queries of one sequence: its inputs (1, tokens, D), positions, attention (queries, tokens) and target."""

    x: Tensor
    positions: Tensor
    attention: Tensor
    target: Tensor
    partition: Tensor


@torch.no_grad()
def _best_start(
    latent: LatentWeights, shape: IndexerShape, moment: Tensor, partition: Tensor, batches: list[_Batch]
) -> IndexerWeights:
    """Return the closed form with the offset and the size of the least loss."""
    best, least = None, math.inf
    for offset in OFFSETS:
        candidate = initial_indexer(latent, shape, moment, partition=partition, offset=offset, size=1.0)
        own = candidate.to(torch.float32, batches[0].x.device)
        scores = [index_scores(own, batch.x, batch.positions)[0] for batch in batches]
        for size in SIZES:
            loss = sum(float(_kl(size * each, batch)) for each, batch in zip(scores, batches, strict=True))
            if best is None or loss < least:
                best, least = replace(candidate, weights=size * candidate.weights), loss
    assert best is not None
    return best


@torch.no_grad()
def _batch(teacher: LatentWeights, x: Tensor, generator: torch.Generator, device: torch.device | str) -> _Batch:
    """Draw queries of a sequence, and compute their attention."""
    # Position 0 attends to itself alone.
    positions = (1 + torch.randperm(len(x) - 1, generator=generator)[:QUERIES]).to(device)
    x = x.to(device)
    attention, partition = summed_attention(teacher, x, positions)
    target = attention.pow(POWER)
    return _Batch(x[None], positions, attention, target / target.sum(-1, keepdim=True), partition)


def _kl(scores: Tensor, batch: _Batch) -> Tensor:
    """Return the KL divergence of the target from the softmax of scores (queries, tokens), in nats per query."""
    past = torch.arange(scores.shape[1], device=scores.device) <= batch.positions[:, None]
    predicted = scores.masked_fill(~past, -torch.inf).log_softmax(-1).masked_fill(~past, 0)
    divergence: Tensor = (torch.special.xlogy(batch.target, batch.target) - batch.target * predicted).sum(-1).mean()
    return divergence


@torch.no_grad()
def _measure(indexer: IndexerWeights, batches: list[_Batch]) -> tuple[float, float, float]:
    """Return the KL divergence, and the shares of the attention on the selected keys and on the best ones."""
    divergence = recall = best = 0.0
    for batch in batches:
        scores = index_scores(indexer, batch.x, batch.positions)
        divergence += float(_kl(scores[0], batch))
        budget = max(1, math.ceil(batch.x.shape[1] / SHARE))
        chosen = select(scores, budget, batch.positions)[0]
        recall += float((batch.attention * chosen).sum(-1).mean())
        best += float(batch.attention.topk(budget, dim=-1).values.sum(-1).mean())
    return divergence / len(batches), recall / len(batches), best / len(batches)
