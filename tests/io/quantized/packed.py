"""Tiny models in every quantised form, made of random codes, with the plain weights computed number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny_models

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": False,
}
# Values of four-bit floats: sign, two bits of exponent, one of mantissa.
E2M1 = [(-1) ** (c >> 3) * ((c & 1) * 0.5 if not c >> 1 & 3 else 2 ** ((c >> 1 & 3) - 1) * (1 + (c & 1) / 2)) for c in range(16)]  # fmt: skip  # noqa: E501

Made = tuple[dict[str, Tensor], Tensor]


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack whole numbers (rows, columns) along the columns into int32, the first number in the lowest bits."""
    each = 32 // bits
    order = order or tuple(range(each))
    rows = []
    for row in codes.tolist():
        row += [0] * (-len(row) % each)
        packed = []
        for start in range(0, len(row), each):
            word = sum(row[start + source] << (bits * place) for place, source in enumerate(order))
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def numbers(generator: torch.Generator, rows: int, columns: int, below: int) -> Tensor:
    return torch.randint(below, (rows, columns), generator=generator)


def scales_of(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (0.01 + 0.02 * torch.rand(*shape, generator=generator)).to(dtype)


def fp8(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    """Blocks of 16 x 32, as the weight_block_size of `SETTINGS` has them."""
    codes = torch.randn(rows, columns, generator=generator).mul(50).to(torch.float8_e4m3fn)
    scale = scales_of(generator, -(-rows // 16), -(-columns // 32), dtype=torch.float32)
    plain = torch.tensor(
        [[float(codes[i, j].float() * scale[i // 16, j // 32]) for j in range(columns)] for i in range(rows)]
    )
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}, plain


def channel_fp8(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    codes = torch.randn(rows, columns, generator=generator).mul(50).to(torch.float8_e4m3fn)
    scale = scales_of(generator, rows, 1, dtype=torch.bfloat16)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes.to(torch.bfloat16) * scale


def int8_rows(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    codes = (numbers(generator, rows, columns, 256) - 128).to(torch.int8)
    scale = scales_of(generator, rows, 1, dtype=torch.float32)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes * scale


def packed_int4(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    """Groups of 16 columns, with zero points."""
    codes, zeros = numbers(generator, rows, columns, 16), numbers(generator, rows, columns // 16, 16)
    scale = scales_of(generator, rows, columns // 16, dtype=torch.bfloat16)
    tensors = {
        f"{name}.weight_packed": words(codes, 4),
        f"{name}.weight_scale": scale,
        f"{name}.weight_zero_point": words(zeros.T, 4).T.contiguous(),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }
    wide = scale.repeat_interleave(16, 1)
    return tensors, (codes - zeros.repeat_interleave(16, 1)).to(torch.bfloat16) * wide


def gptq(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    """Groups of 16 inputs in an order of their own; zero points are stored less one."""
    codes, zeros = numbers(generator, columns, rows, 16), 1 + numbers(generator, columns // 16, rows, 15)
    scale = scales_of(generator, columns // 16, rows)
    groups = (torch.arange(columns) // 16)[torch.randperm(columns, generator=generator)].to(torch.int32)
    tensors = {
        f"{name}.qweight": words(codes.T, 4).T.contiguous(),
        f"{name}.qzeros": words(zeros - 1, 4),
        f"{name}.scales": scale,
        f"{name}.g_idx": groups,
    }
    plain = [
        [scale[g, i] * (codes[j, i] - zeros[g, i]) for j, g in enumerate(groups.tolist())] for i in range(rows)
    ]
    return tensors, torch.tensor(plain, dtype=torch.float16)


def awq(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    codes, zeros = numbers(generator, columns, rows, 16), numbers(generator, columns // 16, rows, 16)
    scale, order = scales_of(generator, columns // 16, rows), (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        f"{name}.qweight": words(codes, 4, order),
        f"{name}.qzeros": words(zeros, 4, order),
        f"{name}.scales": scale,
    }
    plain = [[(codes[j, i] - zeros[j // 16, i]) * scale[j // 16, i] for j in range(columns)] for i in range(rows)]
    return tensors, torch.tensor(plain, dtype=torch.float16)


def int8(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    codes = (numbers(generator, rows, columns, 255) - 127).to(torch.int8)
    scale = scales_of(generator, rows, dtype=torch.float32)
    tensors = {f"{name}.weight": codes, f"{name}.SCB": scale, f"{name}.weight_format": torch.tensor(0).byte()}
    return tensors, codes * scale[:, None] * 7.874015718698502e-3


def nf4(name: str, rows: int, columns: int, generator: torch.Generator) -> Made:
    """Blocks of 32 numbers, whose scales are quantised in blocks of 16."""
    codes = numbers(generator, 1, rows * columns, 16)[0]
    blocks = rows * columns // 32
    table = torch.linspace(-1, 1, 16) ** 3
    nested_table, offset = torch.linspace(-0.01, 0.01, 256), 0.03125
    absmax, nested = (
        numbers(generator, 1, blocks, 256)[0],
        scales_of(generator, -(-blocks // 16), dtype=torch.float32),
    )
    record = {
        "quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [rows, columns],
        "nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    weight = f"{name}.weight"
    tensors = {
        weight: (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        f"{weight}.absmax": absmax.to(torch.uint8),
        f"{weight}.quant_map": table,
        f"{weight}.nested_absmax": nested,
        f"{weight}.nested_quant_map": nested_table,
        f"{weight}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(record).encode()), dtype=torch.uint8
        ),
    }
    scale = [nested_table[absmax[b]] * nested[b // 16] + torch.tensor(offset) for b in range(blocks)]
    plain = torch.stack([table[c] * scale[i // 32] for i, c in enumerate(codes.tolist())])
    return tensors, plain.view(rows, columns)


METHODS: dict[str, tuple[Callable[..., Made], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 32]}),
    "channel_fp8": (channel_fp8, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "int8_rows": (int8_rows, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "packed_int4": (packed_int4, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


def save_quantised(folder: Path, method: str, **overrides: Any) -> dict[str, Tensor]:
    """Write a tiny Llama whose layers are quantised, and return its plain bfloat16 tensors."""
    make, settings = METHODS[method]
    stored = torch.float16 if method in ("gptq", "awq") else torch.bfloat16
    tiny_models.save("llama", folder, stored, **{**SIZES, **overrides})
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain[name] = tensor.to(torch.bfloat16)
        if tensor.dim() == 2 and ".layers." in name:
            made, values = make(name.removesuffix(".weight"), *tensor.shape, generator)
            tensors |= made
            plain[name] = values.to(torch.bfloat16)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = tiny_models.read_config(folder) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return plain
