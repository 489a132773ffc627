"""Gather a cached prefix from pages at any cache row, as vLLM's operator does at three."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The cache rows of vLLM's operator and of its metadata.
ROWS = (320, 512, 576)


def gather_rows(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    token_to_seq: Tensor,
    num_tokens: int,
    kv_cache_dtype: str,
    scale: Tensor,
    seq_starts: Tensor | None = None,
) -> None:
    """Copy the cached tokens of each sequence into a contiguous buffer.

    Args:
        src_cache: (pages, page_size, row), in the type of the model, or FP8 as uint8 or e4m3.
        dst: (at least num_tokens, row), written in place.
        block_table: (sequences, pages of a sequence) int32.
        cu_seq_lens: (sequences + 1) int32, where each sequence begins in `dst`.
        token_to_seq: (at least num_tokens) int32, the sequence of each row of `dst`.
        num_tokens: rows to write.
        kv_cache_dtype: vLLM's name of the element type; FP8 begins with "fp8".
        scale: of an FP8 cache, one number.
        seq_starts: (sequences) int32, the first token to copy of each sequence; None: 0.
    """
    sequence = token_to_seq[:num_tokens].long()
    position = torch.arange(num_tokens, device=dst.device) - cu_seq_lens[sequence]
    if seq_starts is not None:
        position = position + seq_starts[sequence]
    page_size = src_cache.shape[1]
    rows = src_cache[block_table[sequence, position // page_size].long(), position % page_size]
    if kv_cache_dtype.startswith("fp8"):
        rows = rows.view(torch.float8_e4m3fn).float() * scale
    dst[:num_tokens] = rows.to(dst.dtype)


def any_row(stock: Callable[..., None]) -> Callable[..., None]:
    """Return vLLM's operator with `gather_rows` for the cache rows that it does not take.

    Args:
        stock: `vllm._custom_ops.gather_and_maybe_dequant_cache`; wrapped already, it is returned as it is.
    """
    if getattr(stock, "any_row", False):
        return stock

    @functools.wraps(stock)
    def gather(*args: Any, **named: Any) -> None:
        cache = named["src_cache"] if "src_cache" in named else args[0]
        (stock if cache.shape[-1] in ROWS else gather_rows)(*args, **named)

    gather.any_row = True  # type: ignore[attr-defined]
    return gather
