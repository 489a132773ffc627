"""The choice of the backend: the rules of the table in docs/guide/kernels.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.kernels import gqa_decode, mla_decode
from headwise.kernels.dispatch import choose_backend, uses_hopper_kernel
from headwise.kernels.gqa_decode import reference


def grouped():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, h, 16, generator=generator) for n, h in ((1, 6), (30, 2), (30, 2))]


def test_the_argument_overrides_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(None) == "auto"
    monkeypatch.setenv("HEADWISE_KERNELS", "sdpa")
    assert choose_backend(None) == "sdpa"
    assert choose_backend("reference") == "reference"
    monkeypatch.setenv("HEADWISE_KERNELS", "cuda")
    with pytest.raises(HeadwiseError, match=r"HEADWISE_KERNELS is 'cuda'"):
        choose_backend(None)


def test_the_reference_runs_on_a_cpu() -> None:
    q, k, v = grouped()
    for actual, expected in zip(gqa_decode(q, k, v), reference.gqa_decode(q, k, v), strict=True):
        assert torch.equal(actual, expected)


def test_a_named_sdpa_runs_torchs_attention() -> None:
    q, k, v = grouped()
    out, lse = gqa_decode(q, k, v, with_lse=False, backend="sdpa")
    assert lse is None
    torch.testing.assert_close(out, reference.gqa_decode(q, k, v)[0])


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_named_backend_that_cannot_run_is_refused(backend: str) -> None:
    q, k, v = grouped()
    lengths = torch.tensor([30, 4], dtype=torch.int32)
    with pytest.raises(HeadwiseError, match=f"gqa_decode cannot run on backend '{backend}'"):
        gqa_decode(q, k, v, lengths=lengths, backend=backend)
    with pytest.raises(HeadwiseError, match=f"mla_decode cannot run on backend '{backend}'"):
        mla_decode(q, q, k[:, :, 0], k[:, :, 1], scale=1.0, backend=backend)


def test_latent_attention_equals_attention_on_expanded_heads() -> None:
    """Absorption is exact: latent attention equals attention on the expanded keys and values."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, nope, rope, rank, width, tokens = 3, 8, 4, 6, 5, 20
    q_nope, q_rope = noise(2, 1, heads, nope), noise(2, 1, heads, rope)
    latent, k_rope = noise(2, tokens, rank), noise(2, tokens, rope)
    k_up, v_up = noise(heads, nope, rank), noise(heads, width, rank)
    mixed, lse = mla_decode(torch.einsum("bshn,hnr->bshr", q_nope, k_up), q_rope, latent, k_rope, scale=0.3)
    k = torch.cat([torch.einsum("btr,hnr->bthn", latent, k_up), k_rope[:, :, None].expand(-1, -1, heads, -1)], -1)
    v = torch.einsum("btr,hvr->bthv", latent, v_up)
    expected, expected_lse = reference.gqa_decode(torch.cat([q_nope, q_rope], -1), k, v, scale=0.3)
    torch.testing.assert_close(torch.einsum("bshr,hvr->bshv", mixed, v_up), expected)
    torch.testing.assert_close(lse, expected_lse)


TOKENS = {"lengths": torch.tensor([30, 4], dtype=torch.int32)}


@pytest.mark.parametrize(
    ("capability", "queries", "width", "options", "expected"),
    [
        ((9, 0), 1, 64, {"with_lse": False}, "triton"),
        ((9, 0), 1, 80, {"with_lse": False}, "sdpa"),
        ((8, 0), 1, 64, {"with_lse": False}, "sdpa"),
        ((8, 0), 1, 64, {}, "triton"),
        ((8, 0), 2, 64, {"with_lse": False}, "triton"),
        ((8, 0), 1, 64, {"with_lse": False} | TOKENS, "triton"),
        ((8, 0), 1, 64, {"with_lse": False, "starts": TOKENS["lengths"]}, "triton"),
        ((8, 0), 1, 64, {"with_lse": False, "window": 8}, "triton"),
        ((8, 0), 1, 64, {"with_lse": False, "block_table": torch.zeros(2, 1, dtype=torch.int32)}, "triton"),
        (None, 1, 64, {"with_lse": False}, "reference"),
    ],
)  # fmt: skip
def test_what_auto_runs_on_a_grouped_cache(
    capability: tuple[int, int] | None,
    queries: int,
    width: int,
    options: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The card is faked, and what runs only states its name. None: tensors that no kernel takes."""
    tiling = pytest.importorskip("headwise.kernels.decode.tiling")
    kernel = pytest.importorskip("headwise.kernels.gqa_decode.triton")
    if tiling.hopper is None and capability == (9, 0):
        pytest.skip("this Triton has no Gluon")
    module = sys.modules["headwise.kernels.gqa_decode"]
    ran: list[str] = []

    def stands_for(name: str, result: Any) -> Callable[..., Any]:
        return lambda *_, **__: ran.append(name) or result

    monkeypatch.setattr(module, "supports_triton", lambda *_: capability is not None)
    monkeypatch.setattr(module, "_sdpa", stands_for("sdpa", None))
    monkeypatch.setattr(kernel, "gqa_decode", stands_for("triton", (None, None)))
    monkeypatch.setattr(module.reference, "gqa_decode", stands_for("reference", (None, None)))
    monkeypatch.setattr(tiling, "card_of", lambda _: tiling.Card(capability or (8, 0), 132, 232448))
    cache = torch.zeros(2, 30, 2, width)
    gqa_decode(torch.zeros(2, queries, 6, width), cache, cache, backend="auto", **options)
    assert ran == [expected]


@pytest.mark.parametrize(
    ("width", "rope", "latent", "expected"),
    [
        (96, 32, True, True),
        (96, 0, False, False),
        (128, 0, False, True),
        (512, 64, True, True),
        (1024, 64, True, False),
    ],
)  # fmt: skip
def test_which_widths_run_a_kernel_for_hopper(
    width: int, rope: int, latent: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiling = pytest.importorskip("headwise.kernels.decode.tiling")
    if tiling.hopper is None:
        pytest.skip("this Triton has no Gluon")
    q = torch.zeros(1)
    for capability, runs in (((9, 0), expected), ((8, 0), False)):
        monkeypatch.setattr(
            tiling, "card_of", lambda _, capability=capability: tiling.Card(capability, 132, 232448)
        )
        assert uses_hopper_kernel(q, width, rope, is_latent=latent) == runs
