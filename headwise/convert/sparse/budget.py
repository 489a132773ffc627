"""Choose the shape of the indexers of DeepSeek sparse attention, and check it."""

from __future__ import annotations

from collections.abc import Iterator

from headwise.convert.settings import ConvertSettings
from headwise.errors import SettingError
from headwise.models.layout import IndexerShape

# The budget where the context is long, and its largest share of the context otherwise.
INDEX_TOPK, SHARE = 2048, 8
# The number of index queries where the attention has no fewer heads.
INDEX_HEADS = 32
# The widths that kernels of engines take, and the elements that an index key has besides its rotary ones at least.
WIDTHS, POSITION_FREE = (64, 128), 32


def indexer_shape(settings: ConvertSettings, heads: int, rope_dim: int, context: int) -> IndexerShape:
    """Choose the shape of the indexers by the settings, and check it.

    Args:
        settings: of the conversion.
        heads: of the attention.
        rope_dim: width of the rotary key, which is also rotated in an index key.
        context: `max_position_embeddings` of the output.

    Raises:
        SettingError: the budget is above the context, or the index key is too narrow.
    """
    budget = settings.index_topk
    if budget is None:
        budget = max(1, min(INDEX_TOPK, context // SHARE))
    if budget >= context:
        raise SettingError(
            "index_topk",
            f"`index_topk` is {budget}, and the context of the output is {context} tokens: every query would "
            "attend to all of them.",
            "Give a smaller number, or a longer `context`.",
        )
    width = settings.index_head_dim
    if width is None:
        least = rope_dim + POSITION_FREE
        width = next((each for each in WIDTHS if each >= least), least)
    if width <= rope_dim:
        raise SettingError(
            "index_head_dim",
            f"`index_head_dim` is {width}, and an index key holds {rope_dim} rotary elements and one more at "
            "least.",
            f"Give {rope_dim + 1} or more, or a smaller `rope_dim`.",
        )
    return IndexerShape(budget, settings.index_heads or min(INDEX_HEADS, heads), width)


def indexer_notes(shape: IndexerShape, hidden_size: int) -> Iterator[str]:
    """Yield the lines of the plan about the indexers.

    Args:
        shape: of the indexers.
        hidden_size: of the model.
    """
    yield (
        f"Sparse attention: up to {shape.index_topk:,} tokens the output is a dense model. Beyond, every query "
        f"attends to {shape.index_topk:,} keys, which {shape.index_n_heads} index queries of "
        f"{shape.index_head_dim} elements select. An indexer adds {shape.num_parameters(hidden_size):,} weights to "
        f"each layer, and {shape.index_head_dim} elements per token to its cache."
    )
    yield (
        "Queries are written in two factors, which the stock class needs. The first is a multiple of the identity, "
        f"and adds {hidden_size**2:,} weights per layer."
    )


def indexer_tensor_shapes(shape: IndexerShape, hidden_size: int, q_lora_rank: int) -> dict[str, tuple[int, ...]]:
    """Return the name inside the attention module and the shape of every tensor of an indexer.

    Args:
        shape: of the indexer.
        hidden_size: of the model.
        q_lora_rank: rank of the query factors, from which the index queries are made.
    """
    heads, width = shape.index_n_heads, shape.index_head_dim
    return {
        "indexer.k_norm.bias": (width,),
        "indexer.k_norm.weight": (width,),
        "indexer.weights_proj.weight": (heads, hidden_size),
        "indexer.wk.weight": (width, hidden_size),
        "indexer.wq_b.weight": (heads * width, q_lora_rank),
    }
