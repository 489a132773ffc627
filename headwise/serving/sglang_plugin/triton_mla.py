"""SGLang's Triton backend for MLA, with the Hopper kernel of headwise for decode."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from headwise.serving.plugin import decode_on_pages, runs_hopper_kernel


class AnyRowAttnBackend(TritonAttnBackend):  # type: ignore[misc]
    """The stock backend, whose decode is the Hopper kernel where it can run.

    A page of the kernel is a page of the pool, whose slots follow each other. The table of a step has the pages
    of its requests, from the rows of `req_to_token`: one copy, which a CUDA graph repeats. It takes batch x longest
    context x 4 bytes, divided by the page size, and stays in the memory of the graph.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # Pages (batch, pages of the longest context) and lengths (batch) of the step; None: the stock decode.
        self._step: tuple[Tensor, Tensor] | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a step that runs without a CUDA graph.

        Args:
            forward_batch: SGLang's description of the step.
        """
        super().init_forward_metadata(forward_batch)
        self._read_step(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Prepare a step by operations that a CUDA graph records and repeats.

        Args:
            forward_batch: SGLang's description of the step, in the buffers of the graph.
        """
        super().init_forward_metadata_in_graph(forward_batch)
        self._read_step(forward_batch)

    def _read_step(self, forward_batch: Any) -> None:
        self._step = None
        # Speculative steps, a cache spread over GPUs and equal splits for every batch are the stock class's.
        special = forward_batch.spec_info is not None or self.dcp_size > 1 or self.enable_deterministic
        if special or not forward_batch.forward_mode.is_decode():
            return
        source = self.kv_index_translator.read_source(
            forward_batch.kv_loc_plan,
            req_pool_indices=forward_batch.req_pool_indices,
            bs=forward_batch.batch_size,
        )
        if source.v2p is None and source.entry_page_size == 1:  # else its slots are virtual, or pages
            table = source.ids[:, :: self.page_size].index_select(0, source.row_ids).int()
            if self.page_size > 1:
                table //= self.page_size
            self._step = table, forward_batch.seq_lens.int()

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **named: Any,
    ) -> Tensor:
        """Attend from the newest token of each request to the latent cache.

        Args:
            q: (tokens, heads * row) or (tokens, heads, row) for rows of kv_lora_rank + qk_rope_head_dim.
            k: (tokens, 1, row), the new rows of the cache.
            v: (tokens, 1, kv_lora_rank), the latent of `k`.
            layer: SGLang's attention layer, with widths and scales.
            forward_batch: SGLang's description of the step.
            save_kv_cache: whether `k` is written first.
            named: other options of the stock method.

        Returns:
            (tokens, heads * kv_lora_rank).
        """
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if self._step is None or not self._has_kernel(query, layer, named):
            return super().forward_decode(  # type: ignore[no-any-return]
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **named
            )
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
        table, lengths = self._step
        out, _ = decode_on_pages(
            query[:, None],
            self.token_to_kv_pool.get_key_buffer(layer.layer_id)[:, 0].unflatten(0, (-1, self.page_size)),
            layer.v_head_dim,
            scale=layer.scaling,
            lengths=lengths,
            block_table=table,
        )
        return out.flatten(1)

    def _has_kernel(self, query: Tensor, layer: Any, named: dict[str, Any]) -> bool:
        """Return whether the Hopper kernel computes this layer: latent attention without any option."""
        pool = self.token_to_kv_pool
        plain = (
            getattr(pool, "kv_lora_rank", None) == layer.v_head_dim
            and layer.tp_k_head_num == 1
            and layer.k_scale is None
            and not layer.logit_cap
            and layer.sliding_window_size <= -1
            and layer.xai_temperature_len <= 0
            and all(value is None for value in named.values())
        )
        return plain and runs_hopper_kernel(query, pool.dtype, layer.v_head_dim)
