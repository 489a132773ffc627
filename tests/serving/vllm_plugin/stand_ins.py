"""Modules in the place of vLLM's, with the names, arguments and checks of 0.33.0 that the plugin uses.

vLLM does not import without its compiled operators, so these classes were written after its sources.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from torch import Tensor

from tests.serving.plugin_host import install_modules

ROWS = (320, 512, 576)
PAGE = 16
CALLS: list[str] = []


@dataclass
class MLACommonDecodeMetadata:
    block_table: Tensor
    seq_lens: Tensor
    dcp_tot_seq_lens: Tensor | None = None


@dataclass
class MLACommonMetadata:
    num_reqs: int
    max_query_len: int
    max_seq_len: int
    causal: bool = True
    head_dim: int | None = None
    decode: Any = None

    def __post_init__(self) -> None:
        if self.head_dim is not None and self.head_dim not in ROWS:
            raise ValueError(f"Head dimension {self.head_dim} is not supported by MLA.")


class TritonMLAMetadataBuilder:
    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        self.metadata_cls: type = MLACommonMetadata


class TritonMLAImpl:
    def __init__(self, scale: float, kv_lora_rank: int, dcp_world_size: int = 1) -> None:
        self.scale, self.kv_lora_rank, self.dcp_world_size = scale, kv_lora_rank, dcp_world_size

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor]:
        CALLS.append("forward_mqa")
        return q, q


class TritonMLABackend:
    @staticmethod
    def get_impl_cls() -> type:
        return TritonMLAImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TritonMLAMetadataBuilder


class FlashMLABackend:
    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(ROWS)


@dataclass(frozen=True, kw_only=True)
class MLADimensions:
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


# The version that vLLM chooses for the card; None: no kernel of its own.
FLASH_ATTENTION: int | None = 3


class FlashAttnPrefillBackend:
    @classmethod
    def supports_mla_dimensions(cls, mla_dimensions: MLADimensions) -> bool:
        known = ((128, 64, 128), (192, 64, 256), (64, 64, 128), (256, 0, 256))
        return mla_dimensions in [
            MLADimensions(qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)
            for nope, rope, value in known
        ]

    def __init__(self, qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int) -> None:
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.vllm_flash_attn_version, self.requires_v_padding = FLASH_ATTENTION, False
        self.flash_attn_varlen_func: Any = functools.partial(flash_attn_varlen_func, FLASH_ATTENTION)


def flash_attn_varlen_func(fa_version: int | None) -> int | None:
    return fa_version


def gather_and_maybe_dequant_cache(src_cache: Tensor, dst: Tensor, *rest: Any, **named: Any) -> None:
    CALLS.append("gather")


class AttentionBackendEnum(Enum):
    TRITON_MLA = "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend"
    FLASHMLA = "vllm.v1.attention.backends.mla.flashmla.FlashMLABackend"


class MLAPrefillBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.mla.prefill.flash_attn.FlashAttnPrefillBackend"


REGISTERED: dict[Enum, str] = {}


def register_backend(backend: Enum, class_path: str) -> None:
    REGISTERED[backend] = class_path


MODULES: dict[str, tuple[Any, ...]] = {
    "vllm": (),
    "vllm._custom_ops": (gather_and_maybe_dequant_cache,),
    "vllm.model_executor.layers.attention.mla_attention": (MLACommonMetadata,),
    "vllm.v1.attention.backends.mla.flashmla": (FlashMLABackend,),
    "vllm.v1.attention.backends.mla.triton_mla": (TritonMLABackend, TritonMLAImpl, TritonMLAMetadataBuilder),
    "vllm.v1.attention.backends.mla.prefill.base": (MLADimensions,),
    "vllm.v1.attention.backends.mla.prefill.flash_attn": (FlashAttnPrefillBackend, flash_attn_varlen_func),
    "vllm.v1.attention.backends.mla.prefill.registry": (MLAPrefillBackendEnum,),
    "vllm.v1.attention.backends.registry": (AttentionBackendEnum, register_backend),
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the modules in the place of vLLM's for one test."""
    CALLS.clear()
    REGISTERED.clear()
    install_modules(monkeypatch, MODULES)
    registry: Any = sys.modules["vllm.v1.attention.backends.mla.prefill.registry"]
    registry.register_mla_prefill_backend = register_backend
    for written in ("flash_mla", "mla_backend", "prefill"):
        monkeypatch.delitem(sys.modules, f"headwise.serving.vllm_plugin.{written}", raising=False)
