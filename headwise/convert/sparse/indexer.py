"""The indexer of DeepSeek sparse attention without its norm, and the stock tensors that hold it.

Pure functions (mathematics, section 4e). The stock indexer normalises its keys by a LayerNorm. As in the latent
norm of MLA, a small scale before the norm lets its epsilon dominate, so that the norm is linear. It still subtracts
the mean of the elements. The last element of an index key is minus the sum of the others before the norm, so that
the mean is zero. After the norm it is a constant 1, with which a query shifts all its scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.models.layout import from_planes, to_planes

# Epsilon of the stock LayerNorm, and the relative error of the linear norm for a token of ordinary size.
NORM_EPS, TOLERANCE = 1e-6, 1e-5


@dataclass(frozen=True)
class IndexerWeights:
    """One indexer in the norm-free parametrization.

    Shapes, with J index queries of width E and `inputs` = D, or D + 1 in a layer with biases:

    - `queries` (J, E, inputs), `keys` (E, D), `key_bias` (E,), `weights` (J, D)

    The score of a query on a key is the sum over j of `weights[j] . x` times ReLU(rope(q_j) . rope(k)). RoPE
    rotates the first elements, in half-split order, by `frequencies` (radians per token of each plane).
    """

    queries: Tensor
    keys: Tensor
    key_bias: Tensor
    weights: Tensor
    frequencies: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> IndexerWeights:
        """Return the same indexer in another precision, on a device.

        Args:
            dtype: of the returned tensors.
            device: of the returned tensors.
        """
        return replace(self, **{name: tensor.to(device, dtype) for name, tensor in vars(self).items()})


def rotate(vectors: Tensor, frequencies: Tensor, positions: Tensor) -> Tensor:
    """Return vectors with their rotary elements rotated.

    Args:
        vectors: (..., tokens, E); the first 2 * len(frequencies) elements are rotary, half-split.
        frequencies: (P / 2,) radians per token.
        positions: (tokens,) of the vectors.
    """
    rotary = 2 * len(frequencies)
    angles = positions.double()[:, None] * frequencies.double()
    turns = torch.polar(torch.ones_like(angles), angles).to(
        torch.complex64 if vectors.dtype != torch.float64 else torch.complex128
    )
    planes = to_planes(vectors[..., :rotary].mT, rotary).mT * turns
    return torch.cat([from_planes(planes.mT).mT, vectors[..., rotary:]], -1)


def index_scores(indexer: IndexerWeights, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the scores of queries on all tokens, (sequences, queries, tokens); no token is masked.

    Args:
        indexer: the indexer, in the dtype and on the device of `x`.
        x: (sequences, tokens, D) inputs of the attention.
        positions: (queries,) of the queries; None: all tokens.
    """
    tokens = torch.arange(x.shape[1], device=x.device)
    chosen = tokens if positions is None else positions
    own = x[:, chosen]
    keys = rotate(x @ indexer.keys.T + indexer.key_bias, indexer.frequencies, tokens)
    inputs = own if indexer.queries.shape[2] == x.shape[2] else torch.cat([own, torch.ones_like(own[..., :1])], -1)
    queries = torch.einsum("bti,jei->bjte", inputs, indexer.queries)
    queries = rotate(queries, indexer.frequencies, chosen)
    scores = torch.relu(queries @ keys.mT[:, None])  # (sequences, J, queries, tokens)
    return torch.einsum("bjts,btj->bts", scores, own @ indexer.weights.T)


def select(scores: Tensor, budget: int, positions: Tensor | None = None) -> Tensor:
    """Return which tokens the queries select, (sequences, queries, tokens) bool: at most `budget` of the past.

    Args:
        scores: from `index_scores`.
        budget: number of tokens that a query selects.
        positions: (queries,) of the queries; None: all tokens.
    """
    tokens = torch.arange(scores.shape[-1], device=scores.device)
    past = tokens[None] <= (tokens if positions is None else positions)[:, None]
    scores = scores.masked_fill(~past, -torch.inf)
    chosen = scores.topk(min(budget, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True) & past


def indexer_tensors(
    indexer: IndexerWeights, prefix: str, query_scale: float, *, moment: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Build the checkpoint tensors of an indexer.

    Args:
        indexer: float64. The last row of its keys is zero, and their last bias 1.
        prefix: "model.layers.3.self_attn".
        query_scale: the factor by which the first query factor and its norm multiply the input.
        moment: (D, D) second moment of the inputs, which gives the size of the elements before the norm.
        dtype: of the tensors.
    """
    heads, width = indexer.queries.shape[:2]
    keys = indexer.keys.clone()
    keys[-1] = -keys[:-1].sum(0)
    energy = float(((keys @ moment) * keys).sum()) / width
    shrink = math.sqrt(2 * NORM_EPS * TOLERANCE / energy) if energy > 0 else 1.0
    keys = keys * shrink
    gain = torch.full_like(indexer.key_bias, math.sqrt(NORM_EPS) / shrink)
    gain[-1] = 0
    tensors = {
        "k_norm.bias": indexer.key_bias,
        "k_norm.weight": gain,
        # The stock scores are divided by the roots of the width and of the number of queries.
        "weights_proj.weight": indexer.weights * math.sqrt(heads * width),
        "wk.weight": keys,
        "wq_b.weight": indexer.queries.flatten(0, 1) / query_scale,
    }
    return {f"{prefix}.indexer.{name}": tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def read_indexer(
    tensors: Mapping[str, Tensor], prefix: str, heads: int, query_scale: float, frequencies: Tensor
) -> IndexerWeights:
    """Read the tensors of `indexer_tensors` into the norm-free parametrization, in float64.

    Args:
        tensors: by their names in the checkpoint.
        prefix: "model.layers.3.self_attn".
        heads: number of index queries.
        query_scale: as in `indexer_tensors`.
        frequencies: (P / 2,) radians per token of each rotary plane.
    """

    def read(name: str) -> Tensor:
        return tensors[f"{prefix}.indexer.{name}"].to(torch.float64)

    keys, queries = read("wk.weight"), read("wq_b.weight").unflatten(0, (heads, -1)) * query_scale
    keys = (keys - keys.mean(0)) * (read("k_norm.weight") / math.sqrt(NORM_EPS))[:, None]
    weights = read("weights_proj.weight") / math.sqrt(heads * len(keys))
    return IndexerWeights(queries, keys, read("k_norm.bias"), weights, frequencies.double())


def query_scale(tensors: Mapping[str, Tensor], prefix: str, norm_eps: float) -> float:
    """Return the factor by which the first query factor, a multiple of the identity, and its norm scale the input.

    Args:
        tensors: of the attention, by their names in the checkpoint.
        prefix: "model.layers.3.self_attn".
        norm_eps: epsilon of the norm between the query factors.
    """
    first = tensors[f"{prefix}.q_a_proj.weight"][0, 0].double()
    return float(first * tensors[f"{prefix}.q_a_layernorm.weight"][0].double() / math.sqrt(norm_eps))
