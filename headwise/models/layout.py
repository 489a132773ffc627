"""Define the layout of an attention layer and the common form of its weights.

`architecture.py` removes the checkpoint's naming, fusing and interleaving. After that, a layer is an
`AttentionLayout` and a `LayerWeights` (or, after a low-rank conversion, a `LatentWeights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

LINEAR = "linear"
CONTEXTS = (8_192, 32_768, 131_072)


@dataclass(frozen=True)
class IndexerShape:
    """The shape of the indexer of DeepSeek sparse attention, which selects the keys that a query attends to.

    Attributes:
        index_topk: number of keys that each query selects. Up to that many tokens, attention is dense.
        index_n_heads: number of index queries.
        index_head_dim: width of the index queries and of the one index key; RoPE rotates its first
            `qk_rope_head_dim` elements.
    """

    index_topk: int
    index_n_heads: int
    index_head_dim: int

    def num_parameters(self, hidden_size: int) -> int:
        """Return the number of weights of an indexer whose queries read the whole hidden state.

        Args:
            hidden_size: width of the residual stream.
        """
        return (self.index_n_heads * (self.index_head_dim + 1) + self.index_head_dim) * hidden_size


@dataclass(frozen=True)
class AttentionLayout:
    """The shape of one attention layer and of its cache entry per token.

    A key has `head_dim` numbers. RoPE rotates the first `rotary_dim` of them (0: the layer has no RoPE). A layer
    with `kv_lora_rank` is MLA: it caches one latent of that rank and one rotary key of `qk_rope_head_dim` numbers.
    All heads share the latent and the rotary key. `part` is what the attention is ("text", "encoder", "decoder",
    "cross" or "vision"); an encoder's and a vision tower's are not `cached`. Cross-attention caches tokens of the
    encoder. A `merged` layer attends to tokens of the decoder and of the encoder at once, and caches both. A layer
    that text alone does not run, such as that of a vision tower, is not `on_text`. A layer with an
    `indexer` also caches one index key per token. A layer that `shares_indexer` has none of its own: it attends to
    the keys that the last indexer before it selects, and caches no index key.

    A layer of the part "linear" has no attention: it is linear attention or a convolution, with a state of constant
    size: `conv_state` elements in the model's dtype and `recurrent_state` elements in float32. Its heads and widths
    are those of the model's attention.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int
    sliding_window: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    part: str = "text"
    cached: bool = True
    on_text: bool = True
    merged: bool = False
    conv_state: int = 0
    recurrent_state: int = 0
    indexer: IndexerShape | None = None
    shares_indexer: bool = False

    @property
    def own_indexer(self) -> IndexerShape | None:
        """The shape of the indexer whose weights the layer has."""
        return None if self.shares_indexer else self.indexer

    @property
    def attends(self) -> bool:
        """Whether the layer has attention."""
        return self.part != LINEAR

    @property
    def kind(self) -> str:
        """Kind of attention: "mha", "gqa", "mqa" or "mla"; "linear" for a layer without attention."""
        if not self.attends:
            return LINEAR
        if self.kv_lora_rank is not None:
            return "mla"
        if self.num_key_value_heads == self.num_attention_heads:
            return "mha"
        return "mqa" if self.num_key_value_heads == 1 else "gqa"

    @property
    def queries_per_group(self) -> int:
        """Number of query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def cache_elements_per_token(self) -> int:
        """Number of cache elements per token in this layer, of either kind if merged; 0 where nothing is cached."""
        index_key = self.own_indexer.index_head_dim if self.own_indexer else 0
        return self.key_value_elements + index_key if self.cached else 0

    @property
    def key_value_elements(self) -> int:
        """Number of elements of keys and values per token in this layer, cached or not."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + (self.qk_rope_head_dim or 0)
        return self.num_key_value_heads * (self.head_dim + self.v_head_dim)

    def num_parameters(self, hidden_size: int) -> int:
        """Return the number of weights in the projections of this layer, its indexer included.

        Args:
            hidden_size: width of the residual stream.
        """
        if not self.attends:
            return 0
        queries_and_output = self.num_attention_heads * (self.head_dim + self.v_head_dim)
        indexer = self.own_indexer.num_parameters(hidden_size) if self.own_indexer else 0
        return (queries_and_output + self.key_value_elements) * hidden_size + indexer

    def can_become(self, num_key_value_heads: int) -> bool:
        """Return whether equal groups of the KV heads, or equal numbers of copies of them, make another number.

        Args:
            num_key_value_heads: the other number.
        """
        a, b = self.num_key_value_heads, num_key_value_heads
        return self.num_attention_heads % b == 0 and (a % b == 0 or b % a == 0)

    def with_groups(self, num_key_value_heads: int) -> AttentionLayout:
        """Return the same layer with another number of key-value heads.

        Args:
            num_key_value_heads: the new number.
        """
        return replace(self, num_key_value_heads=num_key_value_heads)


Self = TypeVar("Self", bound="_Weights")


class _Weights:
    """Tensors of one layer, and its other properties."""

    def to_device(self: Self, device: torch.device | str) -> Self:
        """Return the same layer on another device.

        Args:
            device: the device of the returned tensors.
        """
        return self._each(lambda tensor: tensor.to(device))

    def to(self: Self, dtype: torch.dtype) -> Self:
        """Return the same layer in another precision.

        Args:
            dtype: the dtype of the returned tensors.
        """
        return self._each(lambda tensor: tensor.to(dtype))

    def _each(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {n: change(t) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class LayerWeights(_Weights):
    """Queries, keys, values and output of one layer, one matrix per head.

    Shapes, with H query heads, G key-value heads, width D and `inputs` = D, or D + 1 in a layer with biases:

    - `q` (H, head_dim, inputs), `k` (G, head_dim, inputs), `v` (G, v_head_dim, inputs); the `inputs` of `k` and `v`
      in cross-attention are the width of the encoder's output
    - `o` (H, D, v_head_dim): head h adds `o[h] @ value` to the residual stream
    - `sinks` (H,): a score of each query head that takes part in its softmax and has no value, or None
    - `gate` (H, v_head_dim, inputs): rows whose sigmoid multiplies the head's output before `o`, or None
    - `q_norm` (H, head_dim), `k_norm` (G, head_dim): the multiplier an RMSNorm on queries and keys applies
      after normalising (offsets such as Gemma's 1 + w already added), or None

    Query head h reads key-value head `h // (H // G)`. A bias is the last column, multiplied by a constant 1, so
    that formulas need no separate bias term. Rotary rows come first and in the half-split order of Hugging Face:
    rows f and f + rotary_dim/2 are the real and imaginary part of plane f. The output bias belongs to no head and
    stays in the checkpoint untouched.
    """

    layout: AttentionLayout
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    # "head": the norm covers one head at a time (Qwen3, Gemma 3); "all": all heads at once (OLMo 2).
    norm_scope: str | None = None
    sinks: Tensor | None = None
    gate: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return self.o.shape[1]

    @property
    def has_bias(self) -> bool:
        """Whether queries, keys and values have a bias as their last column."""
        return self.q.shape[2] == self.hidden_size + 1

    def with_query_heads(self, order: Sequence[int]) -> LayerWeights:
        """Return the layer with its query heads, and all that belongs to them, in another order.

        Args:
            order: the query head that comes to each place.
        """
        if list(order) == list(range(len(self.q))):
            return self
        return replace(
            self,
            **{
                name: tensor[order]
                for name in ("q", "o", "q_norm", "sinks", "gate")
                if (tensor := getattr(self, name)) is not None
            },
        )


@dataclass(frozen=True)
class LatentWeights(_Weights):
    """One MLA layer in the norm-free parametrization: no latent norm, scores scaled by `scale`.

    Shapes, with rank R, rotary width P, position-free width N and value width V:

    - `q_nope` (H, N, inputs), `q_rope` (H, P, inputs)
    - `kv_down` (R, inputs): the latent `c = kv_down @ x`; `k_rope` (P, inputs): the rotary key all heads share
    - `k_up` (H, N, R), `v_up` (H, V, R), `o` (H, D, V)

    The score of a query on a key is `scale * (q_nope . k_up c + rope(q_rope) . rope(k_rope))`. Rotary rows are
    half-split, as in `LayerWeights`, and plane i turns with `frequencies[i]` (radians per token, P/2 of them).
    A bias is the last input column.
    """

    layout: AttentionLayout
    q_nope: Tensor
    q_rope: Tensor
    kv_down: Tensor
    k_rope: Tensor
    k_up: Tensor
    v_up: Tensor
    o: Tensor
    frequencies: Tensor
    scale: float

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return self.o.shape[1]


@dataclass(frozen=True)
class NormedLatent(_Weights):
    """One MLA layer of a stock class with the norm of its latent, which is not linear.

    Shapes, with rank R, rotary width P, position-free width N and value width V. `inputs` is the width D, or D + 1
    with biases; `query_inputs` is `inputs`, or the rank of queries in two factors:

    - `kv_down` (R, inputs), `norm` (R,): the latent is `c = norm * z / sqrt(mean(z^2) + eps)`, `z = kv_down @ x`
    - `k_rope` (P, inputs): the rotary key all heads share; `k_up` (H, N, R), `v_up` (H, V, R), `o` (H, D, V)
    - `q_nope` (H, N, query_inputs), `q_rope` (H, P, query_inputs)
    - `q_down` (query rank, inputs), `q_norm` (query rank,): queries read the normed `q_down @ x`; None: they read x

    The score of a query on a key is `scale * (q_nope . k_up c + rope(q_rope) . rope(k_rope))`. Rotary rows are
    half-split, as in `LayerWeights`. A bias is the last input column.
    """

    layout: AttentionLayout
    kv_down: Tensor
    norm: Tensor
    k_rope: Tensor
    k_up: Tensor
    v_up: Tensor
    q_nope: Tensor
    q_rope: Tensor
    o: Tensor
    q_down: Tensor | None = None
    q_norm: Tensor | None = None
    eps: float = 1e-6

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return self.o.shape[1]

    def normed(self, rows: Tensor) -> Tensor:
        """Return rows divided by their root-mean-square, without the norm's weight.

        Args:
            rows: (..., R).
        """
        return rows * (rows.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def query_inputs(self, inputs: Tensor) -> Tensor:
        """Return what the queries are made from.

        Args:
            inputs: (..., inputs) of the attention, with a constant 1 where there are biases.
        """
        if self.q_down is None or self.q_norm is None:
            return inputs[..., : self.q_nope.shape[-1]]
        return self.normed(inputs @ self.q_down.T) * self.q_norm


def to_planes(rows: Tensor, rotary_dim: int) -> Tensor:
    """Return half-split rotary rows as complex planes.

    Args:
        rows: (..., at least rotary_dim, inputs), real.
        rotary_dim: number of rotary dimensions; the first rows are the rotary ones.

    Returns:
        (..., rotary_dim / 2, inputs), complex: `rows[f] + i rows[f + rotary_dim / 2]` (mathematics, section 0).
    """
    half = rotary_dim // 2
    return torch.complex(rows[..., :half, :].contiguous(), rows[..., half:rotary_dim, :].contiguous())


def from_planes(planes: Tensor) -> Tensor:
    """Return complex planes as half-split rotary rows; the inverse of `to_planes`.

    Args:
        planes: (..., planes, inputs), complex.

    Returns:
        (..., 2 planes, inputs), real.
    """
    return torch.cat([planes.real, planes.imag], dim=-2)


# The part that reads another model's output, and the tokens that each part's cache holds.
CROSS = "cross"
CACHED_TOKENS = {CROSS: "encoder token", "decoder": "decoder token"}
MERGED_TOKENS = "decoder or encoder token"


def text_layouts(layouts: Sequence[AttentionLayout]) -> list[AttentionLayout]:
    """Return the layouts of the layers that text runs.

    Args:
        layouts: of every layer.
    """
    return [layout for layout in layouts if layout.on_text]


def cached_tokens(layout: AttentionLayout) -> str:
    """Return the tokens that the cache of a layer counts, such as "encoder token" for cross-attention.

    Args:
        layout: of the layer.
    """
    return MERGED_TOKENS if layout.merged else CACHED_TOKENS.get(layout.part, "token")


def caches(layouts: Iterable[AttentionLayout]) -> list[AttentionLayout]:
    """Return a layout for every cache: of merged attention, one of decoder tokens and one of encoder tokens.

    Args:
        layouts: of every layer.
    """
    found = []
    for layout in layouts:
        if layout.cached:
            found.append(replace(layout, merged=False))
        if layout.cached and layout.merged:
            found.append(replace(layout, merged=False, part=CROSS, sliding_window=None))
    return found


@dataclass(frozen=True)
class CacheSize:
    """Size of a model's KV cache: bytes for one more token, and total bytes after `at` tokens."""

    bytes_per_token: int
    at: dict[int, int]

    @classmethod
    def of(cls, layouts: Sequence[AttentionLayout], dtype: torch.dtype, longest: int | None = None) -> CacheSize:
        """Return the cache size of one sequence. The cache of a layer with a full sliding window does not grow.

        The states of linear layers are in the totals, and not in the bytes for one more token.

        Args:
            layouts: layout of every layer.
            dtype: dtype of the cache.
            longest: context of the model, in tokens: the last entry of `at`, after the shorter ones of `CONTEXTS`.
                None: unknown, and `at` has all of `CONTEXTS`.
        """
        contexts = CONTEXTS if longest is None else (*(n for n in CONTEXTS if n < longest), longest)

        def total(tokens: int) -> int:
            seen = ((min(tokens, layer.sliding_window or tokens), layer) for layer in caches(layouts))
            return sum(count * layer.cache_elements_per_token for count, layer in seen) * dtype.itemsize

        states = state_bytes(layouts, dtype)
        return cls(total(1), {tokens: total(tokens) + states for tokens in contexts})


def state_bytes(layouts: Sequence[AttentionLayout], dtype: torch.dtype) -> int:
    """Return the bytes of the states that linear layers keep for a sequence of any length.

    Args:
        layouts: layout of every layer.
        dtype: of the model; recurrent states are float32.
    """
    return sum(
        layer.conv_state * dtype.itemsize + layer.recurrent_state * torch.float32.itemsize for layer in layouts
    )


def describe(layout: AttentionLayout) -> dict[str, Any]:
    """Return a layout with its kind and cache size, for `--json`.

    Args:
        layout: layout of the layer.
    """
    return {"kind": layout.kind, "cache_elements_per_token": layout.cache_elements_per_token, **asdict(layout)}
