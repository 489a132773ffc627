"""vLLM's Triton MLA backend at any cache row, with the Hopper kernel of headwise for decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl, TritonMLAMetadataBuilder

from headwise.serving.plugin import decode_on_pages, runs_hopper_kernel
from headwise.serving.vllm_plugin.gather import ROWS, any_row

# Query tokens of a sequence that the kernel takes.
MAX_QUERIES = 8

# The prefill of every backend looks the operator up in this module.
_custom_ops.gather_and_maybe_dequant_cache = any_row(_custom_ops.gather_and_maybe_dequant_cache)


class AnyRowMetadata(MLACommonMetadata):  # type: ignore[misc]
    """Metadata that accept every cache row. The stock class raises ValueError for all but three."""

    def __post_init__(self) -> None:
        """Check nothing."""


class AnyRowMetadataBuilder(TritonMLAMetadataBuilder):  # type: ignore[misc]
    """The stock builder of `AnyRowMetadata`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.metadata_cls = AnyRowMetadata


class AnyRowMLAImpl(TritonMLAImpl):  # type: ignore[misc]
    """The stock implementation, whose decode is the Hopper kernel where it can run."""

    def forward_mqa(
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from the newest tokens to the latent cache.

        Args:
            q: (tokens, heads, kv_lora_rank + qk_rope_head_dim), or its two parts.
            kv_c_and_k_pe_cache: (pages, page_size, kv_lora_rank + qk_rope_head_dim).
            attn_metadata: of the step; `decode` has lengths and pages of each sequence.
            layer: the attention layer, with the scales of an FP8 cache.

        Returns:
            (tokens, heads, kv_lora_rank), and the natural log-sum-exp (tokens, heads).
        """
        query = torch.cat(q, -1) if isinstance(q, tuple) else q
        decode, rank = attn_metadata.decode, self.kv_lora_rank
        queries, rest = divmod(query.shape[0], max(decode.seq_lens.shape[0], 1))
        served = kv_c_and_k_pe_cache.shape[-1] in ROWS  # rows that vLLM serves run in its own code
        if served or rest or not self._has_kernel(query, kv_c_and_k_pe_cache, queries, attn_metadata.causal):
            return super().forward_mqa(query, kv_c_and_k_pe_cache, attn_metadata, layer)  # type: ignore[no-any-return]
        # The table has room for the longest model length.
        pages = -(-attn_metadata.max_seq_len // kv_c_and_k_pe_cache.shape[1])
        out, lse = decode_on_pages(
            query.unflatten(0, (-1, queries)),
            kv_c_and_k_pe_cache,
            rank,
            scale=self.scale,
            lengths=decode.seq_lens,
            block_table=decode.block_table[:, :pages],
        )
        return out.flatten(0, 1), lse.flatten(0, 1)

    def _has_kernel(self, query: Tensor, cache: Tensor, queries: int, causal: bool) -> bool:
        """Return whether the Hopper kernel computes this step."""
        # Several tokens without a causal mask, or with a cache that is spread over GPUs, are the stock class's.
        several = queries > 1 and (not causal or self.dcp_world_size > 1)
        known = 1 <= queries <= MAX_QUERIES and not several
        return known and runs_hopper_kernel(query, cache.dtype, self.kv_lora_rank)


class AnyRowMLABackend(TritonMLABackend):  # type: ignore[misc]
    """The stock backend with the classes above."""

    @staticmethod
    def get_impl_cls() -> type[AnyRowMLAImpl]:
        """Return the implementation."""
        return AnyRowMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AnyRowMetadataBuilder]:
        """Return the builder of the metadata."""
        return AnyRowMetadataBuilder
