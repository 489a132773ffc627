"""Reference and kernel of `rope_cache` against the stock modules of DeepSeek."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from headwise.kernels.rope_cache.reference import rope_cache as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(tokens=5, heads=3, rank=48, rope=16, block=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, heads, 8 + rope, generator=generator).to(DEVICE, dtype)[..., 8:]
    compressed = torch.randn(tokens, rank + rope, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(rank, generator=generator).to(DEVICE, dtype)
    positions = torch.tensor([0, 1, 7, 130, 8191], device=DEVICE)[:tokens]
    frequencies = 10000 ** -torch.linspace(0, 1, rope // 2, device=DEVICE)
    caches = [torch.full((6, block, n), -7.0, dtype=dtype, device=DEVICE) for n in (rank, rope)]
    slots = torch.tensor([3, 22, -1, 8, 0], device=DEVICE)[:tokens]
    return q, compressed, weight, positions, frequencies, *caches, slots


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_equals_stock_deepseek(interleaved: bool) -> None:
    q, compressed, weight, positions, frequencies, latent, k_rope, slots = problem()
    actual = reference(
        q, compressed, weight, positions, frequencies, latent, k_rope, slots, eps=1e-6, interleaved=interleaved
    )
    norm = DeepseekV3RMSNorm(48, 1e-6)
    norm.weight.data = weight
    angle = (positions[:, None].float() * frequencies).repeat(1, 2)[None]
    rotate = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    expected_q, expected_k = rotate(
        q.transpose(0, 1)[None], compressed[:, 48:][None, None], angle.cos(), angle.sin()
    )
    torch.testing.assert_close(actual, expected_q[0].transpose(0, 1))
    cached = slots >= 0
    torch.testing.assert_close(latent.flatten(0, 1)[slots[cached]], norm(compressed[:, :48])[cached])
    torch.testing.assert_close(k_rope.flatten(0, 1)[slots[cached]], expected_k[0, 0][cached])
    assert (latent.flatten(0, 1) == -7).all(-1).sum() == 20


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads, rank, rope", [(3, 48, 16), (1, 128, 24)])
def test_the_kernel_equals_the_reference(interleaved: bool, heads: int, rank: int, rope: int) -> None:
    pytest.importorskip("triton")
    from headwise.kernels.rope_cache.triton import rope_cache

    ours, theirs = problem(heads=heads, rank=rank, rope=rope), problem(heads=heads, rank=rank, rope=rope)
    options = dict(eps=1e-6, interleaved=interleaved, attention_scaling=1.3)
    torch.testing.assert_close(rope_cache(*ours, **options), reference(*theirs, **options), rtol=1e-4, atol=1e-4)
    for actual, expected in zip(ours[5:7], theirs[5:7], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
