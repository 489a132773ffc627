"""The closed form of an indexer: one key for all heads, of what the attention scores of a layer depend on most.

An index key is the rotary key of MLA, and the directions of the latent that carry most of the position-free scores
(mathematics, section 4e). Index query j reads it as attention head j does, shifted by the logarithm of the head's
partition function, so that ReLU keeps the keys that get a share of the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.convert.linalg import sqrt_and_pinv, top_eigenpairs
from headwise.convert.sparse.indexer import IndexerWeights
from headwise.models.layout import IndexerShape, LatentWeights

# Added to the diagonal of the moment, relative to its mean, where a constant is regressed on the inputs.
RIDGE = 1e-4
# The weight of the latent's own energy beside that of the scores, in the choice of its directions.
PRIOR, TINY = 1e-6, 1e-200
# Directions of the latent below this share of the largest one are left out.
TOLERANCE = 1e-4


def constant_direction(moment: Tensor) -> Tensor:
    """Return the linear function of the input that is nearest to a constant 1, (D,).

    Args:
        moment: (D + 1, D + 1) second moment of the inputs with a constant 1 appended.
    """
    inputs = moment[:-1, :-1]
    ridge = RIDGE * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=moment.dtype, device=moment.device)
    direction: Tensor = torch.linalg.solve(inputs + ridge, moment[:-1, -1])
    return direction


def initial_indexer(
    latent: LatentWeights,
    shape: IndexerShape,
    moment: Tensor,
    *,
    partition: Tensor,
    offset: float,
    size: float,
) -> IndexerWeights:
    """Return the closed form of an indexer, float64 on the device of `moment`.

    Args:
        latent: the MLA layer.
        shape: of the indexer.
        moment: (D + 1, D + 1) second moment of the inputs with a constant 1 appended.
        partition: (H,) mean over queries of the logarithm of each head's partition function.
        offset: nats below it at which ReLU cuts a head's scores off; further queries of one head cut off earlier.
        size: the weight of every index query.
    """
    heads, rope = latent.layout.num_attention_heads, latent.k_rope.shape[0]
    inputs = latent.kv_down.shape[1]
    biased = inputs == len(moment)
    own = moment if biased else moment[:-1, :-1]
    features = shape.index_head_dim - rope - 1
    down, queries = _leading_features(latent, own, features)

    width, one = shape.index_head_dim, constant_direction(moment)
    index_queries = moment.new_zeros(shape.index_n_heads, width, inputs)
    shift = torch.cat([torch.zeros_like(one), one.new_ones(1)]) if biased else one
    copies = -(-shape.index_n_heads // heads)
    for j in range(shape.index_n_heads):
        if copies == 1:  # as many heads as queries, or more: an index query is the mean of some
            group = slice(j * heads // shape.index_n_heads, (j + 1) * heads // shape.index_n_heads)
        else:
            group = slice(j % heads, j % heads + 1)
        cut = offset * (1 - (j // heads) / copies) if copies > 1 else offset
        index_queries[j, :rope] = latent.scale * latent.q_rope[group].mean(0)
        index_queries[j, rope:-1] = latent.scale * queries[group].mean(0)
        index_queries[j, -1] = (cut - partition[group].mean()) * shift
    keys = moment.new_zeros(width, len(one) + biased)
    keys[:rope], keys[rope:-1] = latent.k_rope, down
    bias = keys[:, -1].clone() if biased else keys.new_zeros(width)
    bias[-1] = 1
    weights = size * one.expand(shape.index_n_heads, -1).clone()
    return IndexerWeights(index_queries, keys[:, : len(one)].clone(), bias, weights, latent.frequencies.to(moment))


def _leading_features(latent: LatentWeights, moment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the functions of the latent that carry most of the position-free scores, and the queries on them.

    Args:
        latent: the layer.
        moment: (inputs, inputs) second moment of the inputs.
        count: number of features; zeros fill up those beyond the rank of the latent.

    Returns:
        (count, inputs) rows on the input of the keys, and (H, count, inputs) rows on that of the queries.
    """
    down = moment.new_zeros(count, latent.kv_down.shape[1])
    rows = moment.new_zeros(len(latent.k_up), count, latent.kv_down.shape[1])
    if not count:
        return down, rows
    root, inverse = sqrt_and_pinv(latent.kv_down @ moment @ latent.kv_down.T)
    queries = torch.einsum("hnr,hni->hri", latent.k_up, latent.q_nope)
    whitened = root @ queries
    scores = torch.einsum("hri,ij,hsj->rs", whitened, moment, whitened)
    # Where no score depends on the latent, its own leading directions remain: training may find a use for them.
    energy = root @ root.T
    scores = scores / scores.trace().clamp_min(TINY) + PRIOR * energy / energy.trace().clamp_min(TINY)
    used = min(count, len(root))
    basis = top_eigenpairs(scores, used)[1]
    # Features of unit size would amplify directions that the text hardly has: each gets its size in the latent.
    size = torch.einsum("rs,ri,si->i", energy, basis, basis).clamp_min(0).sqrt()
    present = size > TOLERANCE * size.amax()
    basis, size = basis * present, torch.where(present, size, 1.0)
    down[:used], rows[:, :used] = (basis * size).T @ inverse.T @ latent.kv_down, (basis / size).T @ whitened
    return down, rows
