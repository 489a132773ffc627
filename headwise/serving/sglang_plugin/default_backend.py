"""Choose SGLang's backend for shapes of MLA that its default does not take.

"fa3" is the default on Hopper. "flashinfer" is the default on Blackwell for DeepSeek-V2 and GLM-4.7-Flash. For
DeepSeek-V3 SGLang names "trtllm_mla" there before it looks for a default, and no hook is called.
"""

from __future__ import annotations

from typing import Any

from headwise.serving.kernel_shapes import fa3_serves, flashinfer_serves

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
