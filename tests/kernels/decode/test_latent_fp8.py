"""The FP8 format of latents: its rounding, its rows, and decode on them by the reference."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from headwise.kernels import mla_decode
from headwise.kernels.decode.latent_fp8 import (
    DTYPE,
    LARGEST,
    cache_views,
    dequantize_latent,
    quantize_latent,
    row_bytes,
)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rank", [512, 384, 144, 48])
def test_rounding_is_within_half_a_unit_of_the_last_place(rank: int) -> None:
    latent = noise(7, rank) * torch.logspace(-6, 6, 7)[:, None]
    values, scales = quantize_latent(latent)
    assert values.dtype == DTYPE and scales.shape == (7, -(-rank // 128))
    unit = scales.repeat_interleave(128, -1)[:, :rank]
    # Three bits of mantissa, and numbers below 2^-6 of the scale in steps of 2^-9.
    bound = torch.maximum(latent.abs() / 16, unit * 2.0**-10) * (1 + 1e-6)
    assert ((dequantize_latent(values, scales) - latent).abs() <= bound).all()
    assert_close(dequantize_latent(values, scales).abs().max(), latent.abs().max())


def test_a_block_of_zeros_stays_zero() -> None:
    latent = noise(2, 256)
    latent[:, :128] = 0
    values, scales = quantize_latent(latent)
    assert (scales[:, 0] == 0).all() and (scales[:, 1] > 0).all()
    assert (dequantize_latent(values, scales)[:, :128] == 0).all()


def test_a_row_at_512_and_64_is_that_of_flash_mla() -> None:
    assert [row_bytes(*shape) for shape in ((512, 64), (256, 64), (384, 32), (128, 64))] == [656, 400, 464, 272]
    rows = torch.zeros(3, 656, dtype=torch.uint8)
    latent, scales, k_rope = cache_views(rows, 512)
    latent.copy_(torch.full((3, 512), LARGEST).to(DTYPE))
    scales.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    k_rope.fill_(-1.0)
    assert (rows[:, :512] == 0x7E).all()
    assert rows[0, 512:528].view(torch.float32).tolist() == [1, 2, 3, 4]
    assert rows[1, 528:].view(torch.bfloat16).tolist() == [-1] * 64


@pytest.mark.parametrize("rank, rope", [(512, 64), (144, 48)])
def test_decode_on_rows_equals_decode_on_the_rounded_latent(rank: int, rope: int) -> None:
    latent, k_rope = noise(2, 20, rank), noise(2, 20, rope).bfloat16()
    values, scales = quantize_latent(latent)
    rows = torch.zeros(2, 20, row_bytes(rank, rope), dtype=torch.uint8)
    views = cache_views(rows, rank)
    for view, content in zip(views, (values, scales, k_rope), strict=True):
        view.copy_(content)
    q_latent, q_rope = noise(2, 1, 3, rank), noise(2, 1, 3, rope)
    lengths = torch.tensor([20, 11], dtype=torch.int32)
    rounded = dequantize_latent(values, scales)
    expected = mla_decode(q_latent, q_rope, rounded, k_rope.float(), scale=0.1, lengths=lengths)
    actual = mla_decode(q_latent, q_rope, views[0], views[2], scale=0.1, lengths=lengths, latent_scale=views[1])
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    # The rounding is visible, and small.
    whole = mla_decode(q_latent, q_rope, latent, k_rope.float(), scale=0.1, lengths=lengths)[0]
    assert 1e-3 < float((actual[0] - whole).norm() / whole.norm()) < 5e-2


def test_a_latent_of_another_type_is_refused() -> None:
    latent, scales = quantize_latent(torch.randn(1, 4, 128))
    q, rope = torch.randn(1, 1, 2, 128), torch.randn(1, 1, 2, 16)
    with pytest.raises(ValueError, match=r"a latent with scales is torch\.float8_e4m3fn"):
        mla_decode(q, rope, latent.view(torch.uint8), torch.randn(1, 4, 16), scale=1.0, latent_scale=scales)
