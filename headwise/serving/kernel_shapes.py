"""Which shapes of MLA the attention kernels of engines take, as read in their sources.

`hopper/flash_api.cpp` of sgl-flash-attn (commit 07a9b0cc) has the shapes of FlashAttention 3, and FlashInfer 0.7.2
those of "flashinfer". A shape is (kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim).
"""

from __future__ import annotations

# The head dims of FlashAttention 2 and 3 are multiples of 8 up to 256.
MULTIPLE, WIDEST = 8, 256
# The head dims (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) of DeepSeek-V3, which prefill of FlashInfer serves;
# its others were not read.
DEEPSEEK_HEADS = (128, 64, 128)


def fa3_decodes(rank: int, rope: int) -> bool:
    """Return whether FlashAttention 3 decodes on a latent cache.

    Args:
        rank: kv_lora_rank.
        rope: qk_rope_head_dim.
    """
    return 256 <= rank <= 512 and 0 < rope <= 64 and rank % MULTIPLE == rope % MULTIPLE == 0


def fa3_serves(rank: int, nope: int, rope: int, value: int) -> bool:
    """Return whether FlashAttention 3 takes a shape, in decode on the latent cache and in prefill on heads.

    Args:
        rank: kv_lora_rank.
        nope: qk_nope_head_dim.
        rope: qk_rope_head_dim.
        value: v_head_dim.
    """
    width = nope + rope
    prefill = (
        (value == width <= WIDEST) or (128 < width <= 192 and 96 < value <= 128) or (width <= 64 and value <= 512)
    )
    return fa3_decodes(rank, rope) and prefill and width % MULTIPLE == value % MULTIPLE == 0


def flashinfer_serves(rank: int, nope: int, rope: int, value: int) -> bool:
    """Return whether "flashinfer" is known to take a shape.

    Args:
        rank: kv_lora_rank.
        nope: qk_nope_head_dim.
        rope: qk_rope_head_dim.
        value: v_head_dim.
    """
    return rank in (128, 256, 512) and rope % 64 == 0 and (nope, rope, value) == DEEPSEEK_HEADS


def fits_padded_prefill(nope: int, rope: int, value: int) -> bool:
    """Return whether FlashAttention 2 and 3 take heads whose values are padded to the width of the keys.

    Args:
        nope: qk_nope_head_dim.
        rope: qk_rope_head_dim.
        value: v_head_dim.
    """
    width = nope + rope
    return width % MULTIPLE == 0 and value <= width <= WIDEST
