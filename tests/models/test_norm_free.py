"""The norm-free module of an MLA layer; its parametrization is tested with the MLA target."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwise.models.norm_free import padded_attention


@pytest.mark.parametrize(("width", "value_width"), [(12, 8), (8, 8), (8, 12)])
def test_padded_values_change_neither_output_nor_gradients(width: int, value_width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, 7, size, generator=generator).requires_grad_() for size in (width, width, value_width)
    )
    plain = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    output, weights = padded_attention(nn.Module(), query, key, value, None, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(output, plain.transpose(1, 2))
    expected = torch.autograd.grad(plain.square().sum(), (query, key, value))
    actual = torch.autograd.grad(output.square().sum(), (query, key, value))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
