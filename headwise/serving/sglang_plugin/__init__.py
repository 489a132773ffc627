"""The plugin for SGLang: MLA at cache rows and head dims that its default on Hopper refuses, without a flag.

SGLang finds `register_backends` by the entry point group `sglang.srt.plugins` and calls it in each of its
processes. `SGLANG_PLUGINS` leaves the plugin out. Two parts change:

- Where the default backend does not take the shape of a model, the default is the backend `triton`, which does. On
  Blackwell SGLang chooses `trtllm_mla` for DeepSeek-V3 before it looks for a default: there the flag is needed.
- `triton` decodes with the Hopper kernel of headwise at rows that no stock kernel was written for.
"""

from __future__ import annotations

from typing import Any

from headwise.serving.plugin import install_plugin, warn_of_missing_part
from headwise.serving.sglang_plugin.default_backend import after_default

# The release whose sources the plugin was written for.
RELEASE = "0.5.23"
# The cache rows that the decode kernel of the stock Triton backend was written for.
TRITON_ROWS = (288, 576)


def register_backends() -> None:
    """Replace the parts of the SGLang that is installed, or log why they stay."""
    install_plugin("SGLang", "sglang", RELEASE, _replace_parts)


def _replace_parts() -> None:
    from sglang.srt.arg_groups.model_override_base import get_default_attn_backend
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if "triton" not in ATTENTION_BACKENDS:
        raise AttributeError("the attention backend triton")
    stock = ATTENTION_BACKENDS["triton"]

    def make_backend(runner: Any) -> Any:
        names = ("kv_lora_rank", "qk_rope_head_dim")
        widths: list[Any] = [getattr(runner.model_config, name, None) for name in names]
        if not runner.use_mla_backend or None in widths or sum(widths) in TRITON_ROWS:
            return stock(runner)
        try:
            from headwise.serving.sglang_plugin.triton_mla import AnyRowAttnBackend
        except (ImportError, AttributeError) as error:
            warn_of_missing_part("SGLang", RELEASE, error)
            return stock(runner)
        return AnyRowAttnBackend(runner)

    register_attention_backend("triton")(make_backend)
    name = f"{get_default_attn_backend.__module__}.{get_default_attn_backend.__name__}"
    HookRegistry.register(name, after_default, HookType.AFTER)
