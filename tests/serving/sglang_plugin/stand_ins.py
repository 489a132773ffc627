"""Modules in the place of SGLang's, with the names, arguments and fields of 0.5.23 that the plugin uses.

SGLang does not import without its compiled kernels, so these classes were written after its sources.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.serving.plugin_host import install_modules

CALLS: list[str] = []


class ForwardMode(Enum):
    EXTEND = auto()
    DECODE = auto()
    IDLE = auto()

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE


@dataclass
class ForwardBatch:
    forward_mode: ForwardMode
    batch_size: int
    req_pool_indices: Tensor
    seq_lens: Tensor
    out_cache_loc: Tensor
    seq_lens_cpu: Tensor | None = None
    kv_loc_plan: Any = None
    out_cache_loc_is_physical: bool = False
    spec_info: Any = None


@dataclass(frozen=True)
class KVIndexTable:
    ids: Tensor
    row_ids: Tensor
    row_stride: int
    entry_page_size: int
    is_translated: bool
    v2p: Tensor | None = None


@dataclass
class KVIndexTranslator:
    req_to_token: Tensor
    v2p: Tensor | None = None
    entry_page_size: int = 1

    def read_source(self, plan: Any, *, req_pool_indices: Tensor, bs: int) -> KVIndexTable:
        assert bs == len(req_pool_indices)
        stride = self.req_to_token.stride(0)
        return KVIndexTable(self.req_to_token, req_pool_indices, stride, self.entry_page_size, False, self.v2p)


@dataclass
class KVWriteLoc:
    loc: Tensor
    swa_loc: Tensor | None = None
    full_loc: Tensor | None = None
    physical: bool = False

    @classmethod
    def for_batch(cls, forward_batch: ForwardBatch, *, swa_loc: Any = None, full_loc: Any = None) -> KVWriteLoc:
        return cls(forward_batch.out_cache_loc, swa_loc, full_loc, forward_batch.out_cache_loc_is_physical)


class MLATokenToKVPool:
    def __init__(self, size: int, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
        self.dtype, self.kv_lora_rank, self.qk_rope_head_dim = dtype, kv_lora_rank, qk_rope_head_dim
        self.kv_buffer = [torch.zeros(size, 1, kv_lora_rank + qk_rope_head_dim, dtype=dtype)]

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.kv_buffer[layer_id]

    def set_kv_buffer(self, layer: Any, loc_info: KVWriteLoc, cache_k: Tensor, cache_v: Tensor) -> None:
        self.kv_buffer[layer.layer_id][loc_info.loc] = cache_k


class RadixAttention:
    def __init__(
        self, num_heads: int, head_dim: int, scaling: float, num_kv_heads: int, layer_id: int, v_head_dim: int
    ) -> None:
        self.tp_q_head_num, self.tp_k_head_num = num_heads, num_kv_heads
        self.qk_head_dim, self.v_head_dim = head_dim, v_head_dim
        self.scaling, self.layer_id = scaling, layer_id
        self.logit_cap, self.sliding_window_size, self.xai_temperature_len = 0.0, -1, -1
        self.k_scale: Tensor | None = None


class TritonAttnBackend:
    def __init__(self, model_runner: Any) -> None:
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.page_size = model_runner.page_size
        self.kv_index_translator = model_runner.kv_index_translator
        self.dcp_size, self.enable_deterministic = 1, False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        CALLS.append("metadata")

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        CALLS.append("metadata in graph")

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        sinks: Any = None, score_mod: Any = None, aux_tensors: Any = None,
    ) -> Any:  # fmt: skip
        CALLS.append("decode")
        return q


class HookType(Enum):
    AFTER = "after"


HOOKS: dict[str, tuple[Callable[..., Any], HookType]] = {}


class HookRegistry:
    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        HOOKS[target] = hook, hook_type


ATTENTION_BACKENDS: dict[str, Callable[[Any], Any]] = {}


def register_attention_backend(name: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def keep(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        ATTENTION_BACKENDS[name] = make
        return make

    return keep


def get_default_attn_backend(server_args: Any, use_mla_backend: bool, model_config: Any) -> str:
    return "fa3"


get_default_attn_backend.__module__ = "sglang.srt.arg_groups.model_override_base"

MODULES: dict[str, tuple[Any, ...]] = {
    "sglang.srt.arg_groups.model_override_base": (get_default_attn_backend,),
    "sglang.srt.layers.attention.attention_registry": (register_attention_backend,),
    "sglang.srt.layers.attention.triton_backend": (TritonAttnBackend,),
    "sglang.srt.mem_cache.memory_pool": (KVWriteLoc,),
    "sglang.srt.plugins.hook_registry": (HookRegistry, HookType),
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the modules in the place of SGLang's for one test."""
    CALLS.clear()
    HOOKS.clear()
    ATTENTION_BACKENDS.clear()
    ATTENTION_BACKENDS["triton"] = TritonAttnBackend
    install_modules(monkeypatch, MODULES)
    registry: Any = sys.modules["sglang.srt.layers.attention.attention_registry"]
    registry.ATTENTION_BACKENDS = ATTENTION_BACKENDS
    monkeypatch.delitem(sys.modules, "headwise.serving.sglang_plugin.triton_mla", raising=False)


def model_config(rank: int, rope: int, nope: int = 64, value: int = 64, **text: Any) -> Any:
    """Return the fields of SGLang's ModelConfig that the plugin reads."""
    return SimpleNamespace(
        kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope, v_head_dim=value,
        hf_text_config=SimpleNamespace(**text),
    )  # fmt: skip


def model_runner(rank: int, rope: int, slots: int = 0, page_size: int = 1) -> Any:
    """Return the fields of SGLang's ModelRunner that the plugin reads."""
    return SimpleNamespace(
        page_size=page_size,
        use_mla_backend=True,
        model_config=model_config(rank, rope),
        token_to_kv_pool=MLATokenToKVPool(slots, torch.float32, rank, rope),
        kv_index_translator=None,
    )
