"""Block FP8 is written as transformers writes it, and comes back with the error of the format."""

from __future__ import annotations

import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from headwise.io.quantized.fp8 import quantize_blocks, round_to_blocks


class Quantizer:
    """What the stock operation reads of its quantizer."""

    def __init__(self, block: tuple[int, int]) -> None:
        self.quantization_config = FineGrainedFP8Config(weight_block_size=block)


def test_codes_and_scales_are_those_of_transformers() -> None:
    torch.manual_seed(4)
    weight = (torch.randn(12, 24) * torch.logspace(-9, 2, 12)[:, None]).to(torch.bfloat16)
    weight[:4, :8] = 0
    codes, scale = quantize_blocks(weight, (4, 8))
    stock = Fp8Quantize(Quantizer((4, 8))).convert({"a.weight": weight})
    assert torch.equal(codes.float(), stock["a.weight"].float())
    assert torch.equal(scale, stock["a.weight_scale_inv"]) and scale.shape == (3, 3)


def test_rounding_errs_by_half_a_step_of_the_largest_code() -> None:
    torch.manual_seed(5)
    weight = torch.randn(8, 16).to(torch.bfloat16)
    rounded = round_to_blocks(weight, (4, 16))
    for rows in (slice(0, 4), slice(4, 8)):
        largest = weight[rows].abs().max().float()
        error = (rounded[rows].float() - weight[rows].float()).abs().max()
        assert 0 < error <= 1.01 * largest * 16 / 448
