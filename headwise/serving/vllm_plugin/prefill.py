"""vLLM's FlashAttention backend for the prefill of MLA, at head dims that it leaves out."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.attention.backends.mla.prefill.base import MLADimensions
from vllm.v1.attention.backends.mla.prefill.flash_attn import FlashAttnPrefillBackend, flash_attn_varlen_func

from headwise.serving.kernel_shapes import fits_padded_prefill


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
        padded = fits_padded_prefill(
            mla_dimensions.qk_nope_head_dim, mla_dimensions.qk_rope_head_dim, mla_dimensions.v_head_dim
        )
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
