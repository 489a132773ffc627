"""The plugin for vLLM, on classes that stand in for vLLM's: what it replaces, and what it leaves as it is."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any

import pytest
import torch

from headwise.kernels.mla_decode import reference
from headwise.serving import plugin as common
from headwise.serving import vllm_plugin
from tests.serving.plugin_host import entry_point, noise, paged
from tests.serving.vllm_plugin import stand_ins
from tests.serving.vllm_plugin.stand_ins import PAGE

RANK, ROPE, HEADS = 48, 16, 3


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)


def plugin(module: str) -> Any:
    return importlib.import_module(f"headwise.serving.vllm_plugin.{module}")


def test_three_backends_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "version", lambda name: "0.33.0")
    vllm_plugin.register()
    assert [backend.name for backend in stand_ins.REGISTERED] == ["TRITON_MLA", "FLASHMLA", "FLASH_ATTN"]
    for backend, path in stand_ins.REGISTERED.items():
        module, _, name = path.rpartition(".")
        stock_module, _, stock_name = str(backend.value).rpartition(".")
        stock = getattr(importlib.import_module(stock_module), stock_name)
        assert issubclass(getattr(importlib.import_module(module), name), stock)


@pytest.mark.parametrize("release", ["0.32.5", "0.33.1", "0.34.0", "1.0"])
def test_another_release_stays_as_it_is(release: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(common, "version", lambda name: release)
    vllm_plugin.register()
    assert not stand_ins.REGISTERED
    assert f"headwise changes nothing in vLLM {release}" in caplog.text


def test_a_vllm_of_another_name_or_with_other_parts_starts(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(common, "version", unknown)
    vllm_plugin.register()
    monkeypatch.setattr(common, "version", lambda name: vllm_plugin.RELEASE)
    monkeypatch.delitem(sys.modules, "vllm.v1.attention.backends.registry")
    vllm_plugin.register()
    assert not stand_ins.REGISTERED
    assert "lacks a part of 0.33.0" in caplog.text


def test_the_entry_point_is_declared() -> None:
    assert entry_point("vllm.general_plugins") is vllm_plugin.register


def test_metadata_accept_every_row() -> None:
    with pytest.raises(ValueError, match="304"):
        stand_ins.MLACommonMetadata(1, 1, 8, head_dim=304)
    builder = plugin("mla_backend").AnyRowMLABackend.get_builder_cls()(None, [], None, "cpu")
    made = builder.metadata_cls(1, 1, 8, head_dim=304)
    assert isinstance(made, stand_ins.MLACommonMetadata) and made.head_dim == 304


def step(queries: int = 1, causal: bool = True, **options: int) -> tuple[Any, torch.Tensor, torch.Tensor, Any]:
    """An implementation, the queries of two sequences, their pages and the metadata."""
    pages, table = paged(noise(2, 64, RANK + ROPE), PAGE)
    lengths = torch.tensor([50, 9], dtype=torch.int32)
    decode = stand_ins.MLACommonDecodeMetadata(table, lengths)
    metadata = stand_ins.MLACommonMetadata(2, queries, 50, causal, decode=decode)
    impl = plugin("mla_backend").AnyRowMLAImpl(0.2, RANK, **options)
    return impl, noise(2 * queries, HEADS, RANK + ROPE), pages, metadata


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernel's way; on a CPU `mla_decode` then computes the reference."""
    monkeypatch.setattr(common, "uses_hopper_kernel", lambda *_, **__: True)
    monkeypatch.setattr(common, "supports_triton", lambda *_: True)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_on_pages_is_latent_attention(queries: int, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    impl, q, pages, metadata = step(queries)
    on_hopper(monkeypatch)
    given = (q[..., :RANK], q[..., RANK:]) if parts else q
    out, lse = impl.forward_mqa(given, pages, metadata, None)
    assert out.shape == (2 * queries, HEADS, RANK) and lse.shape == (2 * queries, HEADS)
    # Row by row: each token with its own length, as the stock kernel takes them.
    for row in range(2 * queries):
        sequence, token = divmod(row, queries)
        length = int(metadata.decode.seq_lens[sequence]) - queries + token + 1
        cache = pages[metadata.decode.block_table[sequence].long()].flatten(0, 1)[None, :length]
        one = q[row][None, None]
        expected = reference.mla_decode(
            one[..., :RANK], one[..., RANK:], cache[..., :RANK], cache[..., RANK:], scale=0.2
        )
        torch.testing.assert_close(out[row], expected[0][0, 0])
        torch.testing.assert_close(lse[row], expected[1][0, 0])
    assert not stand_ins.CALLS


@pytest.mark.parametrize(
    "case", ["no hopper", "not causal", "context parallel", "fp8 cache", "too many tokens", "uneven"]
)
def test_the_stock_class_decodes_what_the_kernel_does_not(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = {"not causal": 2, "context parallel": 2, "too many tokens": 9}.get(case, 1)
    parallel = 2 if case == "context parallel" else 1
    impl, q, pages, metadata = step(queries, case != "not causal", dcp_world_size=parallel)
    if case != "no hopper":
        on_hopper(monkeypatch)
    if case == "fp8 cache":
        pages = pages.to(torch.float8_e4m3fn)
    if case == "uneven":
        q = noise(3, HEADS, RANK + ROPE)
    assert torch.equal(impl.forward_mqa(q, pages, metadata, None)[0], q)
    assert stand_ins.CALLS == ["forward_mqa"]
