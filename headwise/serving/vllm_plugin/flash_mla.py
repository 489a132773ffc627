"""vLLM's FlashMLA backend, chosen only for the cache row that its kernel takes."""

from __future__ import annotations

from vllm.v1.attention.backends.mla.flashmla import FlashMLABackend


class FlashMLABackend576(FlashMLABackend):  # type: ignore[misc]
    """Leave cache rows of 320 and 512 to the Triton backend, where vLLM does not choose FlashAttention."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the cache rows of FlashMLA."""
        return [576]
