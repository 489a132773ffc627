"""vLLM's FlashAttention backend for the prefill of MLA, at head dims that it leaves out."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.attention.backends.mla.prefill.base import MLADimensions
from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend, flash_attn_varlen_func

# The head dims of FlashAttention 2 and 3 are multiples of 8 up to 256.
MULTIPLE, WIDEST = 8, 256


class AnyHeadsPrefillBackend(FlashAttnPrefillBackend):  # type: ignore[misc]
    """The stock backend where it has the head dims, else FlashAttention on values padded to the width of keys.

    FlashAttention 3 runs where vLLM chooses it (Hopper), and 2 elsewhere: 4 has few head dims.
    """

    vllm_flash_attn_version: int | None

    @classmethod
    def supports_mla_dimensions(cls, mla_dimensions: MLADimensions) -> bool:
        """Return whether prefill can run.

        Args:
            mla_dimensions: head dims of the model.
        """
        width = mla_dimensions.qk_nope_head_dim + mla_dimensions.qk_rope_head_dim
        padded = width % MULTIPLE == 0 and mla_dimensions.v_head_dim <= width <= WIDEST
        return padded or bool(super().supports_mla_dimensions(mla_dimensions))

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        dimensions = MLADimensions(
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        if not super().supports_mla_dimensions(dimensions):
            if self.vllm_flash_attn_version != 3:
                self.vllm_flash_attn_version = 2
                self.flash_attn_varlen_func = functools.partial(flash_attn_varlen_func, fa_version=2)
            self.requires_v_padding = True
