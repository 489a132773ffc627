"""The plugin for vLLM: MLA at every rank and rotary width, and at more head dims.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its processes. Three
backends are replaced by subclasses of themselves, so that no flag is needed. `VLLM_PLUGINS` leaves the plugin out.
"""

from __future__ import annotations

from headwise.serving.plugin import install_plugin

# The release whose sources the subclasses were written for.
RELEASE = "0.33.0"


def register() -> None:
    """Replace the backends of the vLLM that is installed, or log why they stay."""
    install_plugin("vLLM", "vllm", RELEASE, _replace_backends)


def _replace_backends() -> None:
    from vllm.v1.attention.backends.mla.prefill.registry import (
        MLAPrefillBackendEnum,
        register_mla_prefill_backend,
    )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.TRITON_MLA, f"{__name__}.mla_backend.AnyRowMLABackend")
    register_backend(AttentionBackendEnum.FLASHMLA, f"{__name__}.flash_mla.FlashMLABackend576")
    register_mla_prefill_backend(MLAPrefillBackendEnum.FLASH_ATTN, f"{__name__}.prefill.AnyHeadsPrefillBackend")
