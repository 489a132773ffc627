"""The plugin for SGLang, on classes that stand in for SGLang's: what it replaces, and what it leaves as it is."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headwise.kernels.mla_decode import reference
from headwise.serving import plugin as common
from headwise.serving import sglang_plugin
from tests.serving.plugin_host import entry_point, noise
from tests.serving.sglang_plugin import stand_ins

RANK, ROPE, HEADS, LENGTHS = 48, 16, 3, (50, 9)


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)
    monkeypatch.setattr(common, "version", lambda name: sglang_plugin.RELEASE)


def test_the_entry_point_is_declared() -> None:
    assert entry_point("sglang.srt.plugins") is sglang_plugin.register_backends


def test_the_backend_and_the_default_are_replaced() -> None:
    sglang_plugin.register_backends()
    backend = stand_ins.ATTENTION_BACKENDS["triton"](stand_ins.model_runner(RANK, ROPE))
    assert isinstance(backend, stand_ins.TritonAttnBackend) and type(backend).__name__ == "AnyRowAttnBackend"
    target = "sglang.srt.arg_groups.model_override_base.get_default_attn_backend"
    assert {target: (sglang_plugin.after_default, stand_ins.HookType.AFTER)} == stand_ins.HOOKS


@pytest.mark.parametrize("shape", [(512, 64), (256, 32), None])
def test_the_stock_backend_serves_its_own_shapes(shape: tuple[int, int] | None) -> None:
    sglang_plugin.register_backends()
    runner = stand_ins.model_runner(*(shape or (RANK, ROPE)))
    runner.use_mla_backend = shape is not None
    assert type(stand_ins.ATTENTION_BACKENDS["triton"](runner)) is stand_ins.TritonAttnBackend


@pytest.mark.parametrize("missing", ["kv_lora_rank", "qk_rope_head_dim"])
def test_the_stock_backend_serves_a_class_without_a_field(missing: str) -> None:
    sglang_plugin.register_backends()
    runner = stand_ins.model_runner(RANK, ROPE)
    delattr(runner.model_config, missing)
    assert type(stand_ins.ATTENTION_BACKENDS["triton"](runner)) is stand_ins.TritonAttnBackend


@pytest.mark.parametrize("release", ["0.5.22", "0.5.24", "0.6.0"])
def test_another_release_stays_as_it_is(release: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(common, "version", lambda name: release)
    sglang_plugin.register_backends()
    assert {"triton": stand_ins.TritonAttnBackend} == stand_ins.ATTENTION_BACKENDS and not stand_ins.HOOKS
    assert f"headwise changes nothing in SGLang {release}" in caplog.text


@pytest.mark.parametrize("part", ["plugins.hook_registry", "layers.attention.attention_registry", "backend"])
def test_a_build_without_a_part_starts(part: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    if part == "backend":
        stand_ins.ATTENTION_BACKENDS.clear()
    else:
        monkeypatch.delitem(sys.modules, f"sglang.srt.{part}")
    before = dict(stand_ins.ATTENTION_BACKENDS)
    sglang_plugin.register_backends()
    assert before == stand_ins.ATTENTION_BACKENDS and not stand_ins.HOOKS
    assert "lacks a part of 0.5.23" in caplog.text


def test_a_worker_without_a_part_gets_the_stock_backend(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    sglang_plugin.register_backends()
    monkeypatch.delitem(sys.modules, "sglang.srt.mem_cache.memory_pool")
    backend = stand_ins.ATTENTION_BACKENDS["triton"](stand_ins.model_runner(RANK, ROPE))
    assert type(backend) is stand_ins.TritonAttnBackend and "lacks a part of 0.5.23" in caplog.text


def step(page_size: int = 1, **batch: Any) -> SimpleNamespace:
    """A backend, and one decode step of two requests whose pages are spread over the pool."""
    runner = stand_ins.model_runner(RANK, ROPE, slots=192 + page_size, page_size=page_size)
    pages = torch.randperm(192 // page_size, generator=torch.Generator().manual_seed(0)) + 1
    tables = (pages[:, None] * page_size + torch.arange(page_size)).int().view(3, 64)
    runner.kv_index_translator = stand_ins.KVIndexTranslator(tables)
    requests, lengths = torch.tensor([2, 0]), torch.tensor(LENGTHS)
    new = tables[requests, lengths - 1].long()
    rows = noise(2, 64, RANK + ROPE)
    for request, row in zip(requests.tolist(), rows, strict=True):
        runner.token_to_kv_pool.kv_buffer[0][tables[request].long()] = row[:, None]
    k = rows[[0, 1], lengths - 1][:, None]
    runner.token_to_kv_pool.kv_buffer[0][new] = torch.nan  # the step writes its own rows
    given = {"forward_mode": stand_ins.ForwardMode.DECODE, **batch}
    forward_batch = stand_ins.ForwardBatch(
        batch_size=2, req_pool_indices=requests, seq_lens=lengths, out_cache_loc=new, **given
    )
    module = importlib.import_module("headwise.serving.sglang_plugin.triton_mla")
    return SimpleNamespace(
        backend=module.AnyRowAttnBackend(runner),
        layer=stand_ins.RadixAttention(HEADS, RANK + ROPE, 0.2, 1, 0, RANK),
        q=noise(2, HEADS, RANK + ROPE),
        k=k,
        batch=forward_batch,
        rows=rows,
    )


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernel's way; on a CPU `mla_decode` then computes the reference."""
    monkeypatch.setattr(common, "uses_hopper_kernel", lambda *_, **__: True)
    monkeypatch.setattr(common, "supports_triton", lambda *_: True)


def decode(case: SimpleNamespace, **named: Any) -> torch.Tensor:
    out: torch.Tensor = case.backend.forward_decode(
        case.q, case.k, case.k[..., :RANK], case.layer, case.batch, **named
    )
    return out


@pytest.mark.parametrize("graph, page_size", [(False, 1), (True, 1), (False, 16), (True, 64)])
def test_decode_on_the_pool_is_latent_attention(
    graph: bool, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = step(page_size)
    on_hopper(monkeypatch)
    prepare = case.backend.init_forward_metadata_in_graph if graph else case.backend.init_forward_metadata
    prepare(case.batch)
    if not graph:
        case.q = case.q.flatten(1)
    out = decode(case)
    assert out.shape == (2, HEADS * RANK)
    query = case.q.view(2, HEADS, -1)
    for i, length in enumerate(LENGTHS):
        q, cache = query[i][None, None], case.rows[i][None, :length]
        expected = reference.mla_decode(
            q[..., :RANK], q[..., RANK:], cache[..., :RANK], cache[..., RANK:], scale=0.2
        )
        torch.testing.assert_close(out[i].view(HEADS, RANK), expected[0][0, 0])
    assert ["metadata in graph" if graph else "metadata"] == stand_ins.CALLS


def test_a_cache_that_is_written_already_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step()
    on_hopper(monkeypatch)
    case.backend.init_forward_metadata(case.batch)
    expected = decode(case)
    case.k = torch.full_like(case.k, torch.nan)
    torch.testing.assert_close(decode(case, save_kv_cache=False), expected)


@pytest.mark.parametrize(
    "change",
    [
        "no hopper", "fp8 cache", "speculative", "context parallel", "deterministic", "virtual slots", "pages",
        "scale", "cap", "window", "temperature", "heads", "sinks",
    ],
)  # fmt: skip
def test_the_stock_class_decodes_what_the_kernel_does_not(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = step(**({"spec_info": object()} if change == "speculative" else {}))
    if change != "no hopper":
        on_hopper(monkeypatch)
    backend, layer = case.backend, case.layer
    changes: dict[str, tuple[Any, str, Any]] = {
        "fp8 cache": (backend.token_to_kv_pool, "dtype", torch.float8_e4m3fn),
        "context parallel": (backend, "dcp_size", 2),
        "deterministic": (backend, "enable_deterministic", True),
        "virtual slots": (backend.kv_index_translator, "v2p", torch.arange(4)),
        "pages": (backend.kv_index_translator, "entry_page_size", 64),
        "scale": (layer, "k_scale", torch.ones(())),
        "cap": (layer, "logit_cap", 30.0),
        "window": (layer, "sliding_window_size", 64),
        "temperature": (layer, "xai_temperature_len", 8),
        "heads": (layer, "v_head_dim", 32),
    }
    if change in changes:
        setattr(*changes[change])
    backend.init_forward_metadata(case.batch)
    before = backend.token_to_kv_pool.kv_buffer[0].clone()
    out = decode(case, **({"sinks": torch.zeros(HEADS)} if change == "sinks" else {}))
    assert out is case.q and stand_ins.CALLS == ["metadata", "decode"]
    assert torch.equal(before.isnan(), backend.token_to_kv_pool.kv_buffer[0].isnan())


def test_a_step_that_is_no_decode_leaves_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step()
    on_hopper(monkeypatch)
    case.backend.init_forward_metadata(case.batch)
    case.batch.forward_mode = stand_ins.ForwardMode.IDLE
    case.backend.init_forward_metadata(case.batch)
    assert decode(case) is case.q
