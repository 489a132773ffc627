"""Choose SGLang's backend for shapes of MLA that its default does not take.

The shapes were read in the sources of the kernels: `hopper/flash_api.cpp` of sgl-flash-attn (commit 07a9b0cc) for
"fa3", and FlashInfer 0.7.2 for "flashinfer".

"fa3" is the default on Hopper. "flashinfer" is the default on Blackwell for DeepSeek-V2 and GLM-4.7-Flash. For
DeepSeek-V3 SGLang names "trtllm_mla" there before it looks for a default, and no hook is called.
"""

from __future__ import annotations

from typing import Any

# The head dims (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) of DeepSeek-V3, which prefill of FlashInfer serves;
# its others were not read.
DEEPSEEK_HEADS = (128, 64, 128)


def fa3_serves(rank: int, nope: int, rope: int, value: int) -> bool:
    """Return whether "fa3" takes a shape, in decode on the latent cache and in prefill on heads.

    Args:
        rank: kv_lora_rank.
        nope: qk_nope_head_dim.
        rope: qk_rope_head_dim.
        value: v_head_dim.
    """
    width = nope + rope
    decode = 256 <= rank <= 512 and 0 < rope <= 64
    prefill = (
        (value == width <= 256) or (128 < width <= 192 and 96 < value <= 128) or (width <= 64 and value <= 512)
    )
    return decode and prefill and not any(each % 8 for each in (rank, rope, width, value))


def flashinfer_serves(rank: int, nope: int, rope: int, value: int) -> bool:
    """Return whether "flashinfer" is known to take a shape.

    Args:
        rank: kv_lora_rank.
        nope: qk_nope_head_dim.
        rope: qk_rope_head_dim.
        value: v_head_dim.
    """
    return rank in (128, 256, 512) and rope % 64 == 0 and (nope, rope, value) == DEEPSEEK_HEADS


SERVES = {"fa3": fa3_serves, "flashinfer": flashinfer_serves}


def after_default(chosen: str, server_args: Any, use_mla_backend: bool, model_config: Any) -> str | None:
    """Return "triton" where the default does not take the shape of a model; None: the default stays.

    SGLang calls it after its own choice, and with the same arguments.

    Args:
        chosen: the default.
        server_args: the arguments of the server.
        use_mla_backend: whether the model has MLA.
        model_config: SGLang's own configuration of the model.
    """
    if not use_mla_backend or chosen not in SERVES:
        return None
    if getattr(model_config.hf_text_config, "index_topk", None) is not None:  # sparse attention has its own backend
        return None
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    shape: list[Any] = [getattr(model_config, name, None) for name in names]
    # SGLang reads some classes, such as MiniCPM3, without all of these fields: their default is its own matter.
    if None in shape:
        return None
    return None if SERVES[chosen](*shape) else "triton"
