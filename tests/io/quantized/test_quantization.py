"""Quantised checkpoints as plain tensors: every form against its numbers and stock loaders; what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headwise.errors import HeadwiseError
from headwise.io.quantized.quantization import plain_config
from headwise.io.reader import make_buffers, open_checkpoint
from tests import tiny_models
from tests.io.quantized.packed import METHODS, save_quantised

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_its_codes_and_scales_to_the_bit(method: str, tmp_path: Path) -> None:
    plain = save_quantised(tmp_path, method)
    checkpoint = open_checkpoint(tmp_path)
    copy = pickle.loads(pickle.dumps(checkpoint))  # as other processes get it
    assert "quantization_config" not in checkpoint.config and not checkpoint.is_plain
    assert checkpoint.config["dtype"] == "bfloat16"
    assert checkpoint.tensors.keys() == plain.keys()
    for name, expected in plain.items():
        tensor = copy.read(name)
        assert (tensor.dtype, checkpoint.tensors[name].shape) == (torch.bfloat16, tuple(expected.shape))
        assert torch.equal(tensor, expected), name
        chunks = b"".join(bytes(chunk.tolist()) for chunk in checkpoint.chunks(name, make_buffers(1)))
        assert chunks == bytes(expected.flatten().view(torch.uint8).tolist())


def test_a_float32_tensor_keeps_its_precision(tmp_path: Path) -> None:
    save_quantised(tmp_path, "fp8")
    rewrite(tmp_path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float() + 1e-6}))
    assert open_checkpoint(tmp_path).read("model.norm.weight").dtype == torch.float32


def test_block_fp8_is_what_the_stock_loader_reads(tmp_path: Path) -> None:
    import transformers

    save_quantised(tmp_path, "fp8", intermediate_size=64)  # it reads whole blocks only
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_compressed_tensors_is_what_the_stock_package_reads(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = {
        "channel_fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "int8_rows": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "packed_int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
    }
    for method, weights in args.items():
        save_quantised(tmp_path / method, method)
        stored = load_file(tmp_path / method / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path / method)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        compressor = BaseCompressor.get_value_from_registry(METHODS[method][1]["format"])
        for name in (n for n in checkpoint.tensors if ".layers.0." in n and "norm" not in n):
            stem = name.removesuffix("weight")
            own = {n.removeprefix(stem): tensor for n, tensor in stored.items() if n.startswith(stem)}
            expected = compressor.decompress(own, scheme)["weight"].to(torch.bfloat16)
            assert torch.equal(checkpoint.read(name), expected), name


def test_bitsandbytes_is_what_the_stock_package_reads(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    weight = torch.randn(48, 64)  # the CPU kernel needs rows of whole blocks
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            folder = tmp_path / f"{kind}{nested}"
            save_quantised(folder, "nf4", hidden_size=64)
            codes, state = bnb.functional.quantize_4bit(
                weight.to(torch.bfloat16), blocksize=64, compress_statistics=nested, quant_type=kind
            )
            name = "model.layers.0.mlp.up_proj.weight"

            def put(tensors: Tensors, name: str = name, codes: torch.Tensor = codes, state: object = state) -> None:
                for old in [n for n in tensors if n.startswith(name)]:
                    del tensors[old]
                tensors[name] = codes
                tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}  # type: ignore[attr-defined]

            rewrite(folder, put)
            expected = bnb.functional.dequantize_4bit(codes, state).to(torch.bfloat16)
            assert torch.equal(open_checkpoint(folder).read(name), expected)
    folder = tmp_path / "int8"
    save_quantised(folder, "int8")
    stored, name = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.k_proj"
    expected = bnb.functional.int8_vectorwise_dequant(stored[f"{name}.weight"], stored[f"{name}.SCB"])
    assert torch.equal(open_checkpoint(folder).read(f"{name}.weight"), expected.to(torch.bfloat16))


def test_gptq_reads_both_versions_and_widths() -> None:
    from headwise.io.quantized.dequantize import gptq_to_plain
    from tests.io.quantized.packed import words

    codes = torch.arange(16).view(16, 1).expand(16, 16).contiguous()
    scales, groups = torch.full((1, 16), 0.5), torch.zeros(16, dtype=torch.int32)
    for bits in (4, 8):
        packed, zeros = words(codes.T, bits).T.contiguous(), words(torch.full((1, 16), 3), bits)
        assert torch.equal(gptq_to_plain(packed, zeros, scales, groups, bits, False)[0], (torch.arange(16) - 3) / 2)
        assert torch.equal(gptq_to_plain(packed, zeros, scales, groups, bits, True)[0], (torch.arange(16) - 4) / 2)


def test_mxfp4_experts_are_what_the_stock_loader_computes() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from headwise.io.quantized.dequantize import mxfp4_to_plain
    from tests.io.quantized.packed import E2M1

    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(256, (3, 5, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 5, 2), generator=generator, dtype=torch.uint8)
    plain = mxfp4_to_plain(blocks, scales)
    assert torch.equal(plain, convert_moe_packed_tensors(blocks, scales))
    low = E2M1[int(blocks[2, 4, 1, 3]) & 15] * 2.0 ** (int(scales[2, 4, 1]) - 127)
    assert float(plain[2, 32 + 6, 4]) == low


QUERIES = "model.layers.1.self_attn.q_proj."


def remove(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[QUERIES + name]

    return change


def reshape(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[QUERIES + name] = tensors[QUERIES + name][:-1].contiguous()

    return change


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("fp8", remove("weight_scale_inv"), "q_proj.weight cannot be read: .*weight_scale_inv is missing"),
        ("fp8", reshape("weight_scale_inv"), "weight_scale_inv has shape .*is needed"),
        ("fp8", remove("weight"), "mixes quantisations: tensor .*q_proj.weight_scale_inv"),
        ("channel_fp8", remove("weight_scale"), "weight_scale is missing"),
        ("packed_int4", remove("weight_shape"), "weight_shape is missing"),
        ("gptq", remove("qzeros"), "q_proj.qweight cannot be read: .*qzeros is missing"),
        ("awq", reshape("scales"), "qzeros has shape .*is needed"),
        ("int8", remove("SCB"), "SCB is missing"),
        ("nf4", remove("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4 is missing"),
        ("nf4", remove("weight.nested_absmax"), "half of its nested scales"),
        (
            "gptq",
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}),
            "mixes quantisations: tensor model.layers.0.mlp.up_proj.weight_scale_inv",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence_from_the_headers(
    method: str, change: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    save_quantised(tmp_path, method)
    rewrite(tmp_path, change)
    with pytest.raises(HeadwiseError, match=message):
        open_checkpoint(tmp_path)


def test_a_group_that_does_not_exist_is_named_with_its_file(tmp_path: Path) -> None:
    save_quantised(tmp_path, "gptq")
    rewrite(tmp_path, lambda t: t[QUERIES + "g_idx"].__setitem__(3, 9999))
    message = (
        r"q_proj.weight in model.safetensors do not fit each other: g_idx names group 9999, .* 0 to \d+\. .*again"
    )
    with pytest.raises(HeadwiseError, match=message):
        open_checkpoint(tmp_path).read(QUERIES + "weight")


def test_a_scale_byte_that_is_nan_is_named_with_its_file(tmp_path: Path) -> None:
    save_quantised(tmp_path, "fp8")

    def change(tensors: Tensors) -> None:
        scale = torch.full(tensors[QUERIES + "weight_scale_inv"].shape, 127, dtype=torch.uint8)
        scale[-1, -1] = 255
        tensors[QUERIES + "weight_scale_inv"] = scale

    rewrite(tmp_path, change)
    message = r"q_proj.weight_scale_inv in model.safetensors has a scale of 255, the byte for NaN.*again"
    with pytest.raises(HeadwiseError, match=message):
        open_checkpoint(tmp_path).read(QUERIES + "weight")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fp8", None, "has quantised weights .*and config.json has no quantization_config"),
        ("fp8", {"quant_method": "hqq"}, "names the method hqq, and headwise reads fp8, compressed-tensors"),
        ("fp8", {"bits": 4}, "names no method by its quant_method"),
        ("fp8", {"bits": 4, "group_size": 32, "mode": "affine"}, "names no method, as MLX writes it"),
        ("fp8", {"quant_method": "fp8", "weight_block_size": None}, "weight_block_size is null"),
        ("gptq", {"quant_method": "gptq", "bits": 3}, "its bits is 3, and 2, 4, 8 can be read"),
        (
            "gptq",
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin'",
        ),
        ("awq", {"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is gemv, and gemm can be read"),
        ("gptq", {"quant_method": "fp8"}, "mixes quantisations"),
    ],
)
def test_a_config_that_names_another_quantisation(
    method: str, settings: object, message: str, tmp_path: Path
) -> None:
    save_quantised(tmp_path, method)
    config = {n: v for n, v in tiny_models.read_config(tmp_path).items() if n != "quantization_config"}
    (tmp_path / "config.json").write_text(
        json.dumps(config | ({"quantization_config": settings} if settings else {}))
    )
    with pytest.raises(HeadwiseError, match=message):
        open_checkpoint(tmp_path)


def test_plain_weights_under_a_quantisation(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path)
    config = tiny_models.read_config(tmp_path) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadwiseError, match="names the quantisation fp8, and no tensor is quantised"):
        open_checkpoint(tmp_path)


def test_a_plain_config_loses_every_entry() -> None:
    entry = {"quant_method": "gptq", "bits": 4}
    config = {
        "model_type": "x",
        "dtype": "float16",
        "compression_config": entry,
        "text_config": {"quantization": {}},
    }
    assert plain_config(config) == {"model_type": "x", "dtype": "bfloat16", "text_config": {}}
    assert plain_config({"quantization_config": None}) == {"quantization_config": None}
