"""The ways to store a quantised weight that can be read, as data: names, dtypes and shapes of its tensors.

A quantised weight is several tensors of a file: codes, scales, and what else its form needs. A form checks them
from the headers, and returns the computation of `dequantize.py` that makes them plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwise.format import dtype_name
from headwise.io.header import TensorEntry
from headwise.io.quantized import dequantize

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_RECORD = 10_000

Parts = Mapping[str, TensorEntry]
Load = Callable[[TensorEntry], Tensor]
Plan = tuple[tuple[int, ...], Callable[[dict[str, Tensor]], Tensor]]


@dataclass(frozen=True)
class Form:
    """One way to store a quantised weight.

    Attributes:
        kind: in words.
        codes: the end of the name of the tensor with the codes.
        weight: the end of the plain name.
        dtypes: of the codes.
        parts: the ends of the names of the other tensors, by their roles.
        optional: likewise, of tensors that may be absent.
        plan: returns the plain shape and the computation, from the parts and the settings; raises ValueError with
            the reason for which the parts cannot be read.
        carried: whether a conversion that does not change such weights carries them over as they are stored.
    """

    kind: str
    codes: str
    weight: str
    dtypes: tuple[torch.dtype, ...]
    parts: Mapping[str, str]
    plan: Callable[[Parts, Mapping[str, Any], Load], Plan]
    optional: Mapping[str, str] = field(default_factory=dict)
    carried: bool = False

    def find(self, name: str, entry: TensorEntry, stored: Parts) -> tuple[str, dict[str, TensorEntry]] | None:
        """Return the plain name and the parts of a weight; None if the tensor holds no codes of this form.

        Args:
            name: of a stored tensor.
            entry: of the tensor.
            stored: all tensors of the files.

        Raises:
            ValueError: a part is missing.
        """
        if not name.endswith(self.codes) or entry.dtype not in self.dtypes:
            return None
        stem = name.removesuffix(self.codes)
        parts = {"codes": entry}
        for role, end in {**self.parts, **self.optional}.items():
            own = next((n for n in (stem + e for e in end.split("|")) if n in stored), None)
            if own is not None:
                parts[role] = stored[own]
            elif role in self.parts:
                raise ValueError(f"{stem + end.split('|')[0]} is missing")
        return stem + self.weight, parts


def require(condition: bool, reason: str) -> None:
    """Raise ValueError with a reason unless a condition holds.

    Args:
        condition: what must hold.
        reason: the end of a sentence.

    Raises:
        ValueError: it does not hold.
    """
    if not condition:
        raise ValueError(reason)


def _shape_of(parts: Parts, role: str, *shapes: tuple[int, ...]) -> None:
    """Refuse a part that has none of some shapes."""
    entry = parts[role]
    require(entry.shape in shapes, f"{entry.name} has shape {entry.shape}, and {shapes[0]} is needed")


def _whole(settings: Mapping[str, Any], key: str, legal: Sequence[int] | None = None) -> int:
    value = settings.get(key)
    valid = type(value) is int and (value in legal if legal else value > 0)
    require(valid, f"its {key} is {value!r}" + (f", and {', '.join(map(str, legal))} can be read" if legal else ""))
    return int(value)  # type: ignore[arg-type]


def _block_size(value: Any) -> tuple[int, int]:
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    require(whole, f"its block size is {value!r}, and two numbers above zero are needed")
    return value[0], value[1]


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _computed(
    function: Callable[..., Tensor], roles: tuple[str, ...], *more: Any
) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a computation from the tensors of some roles. It can be sent to other processes."""
    return partial(_compute, function, roles, more)


def _compute(
    function: Callable[..., Tensor], roles: tuple[str, ...], more: tuple[Any, ...], tensors: dict[str, Tensor]
) -> Tensor:
    return function(*map(tensors.get, roles), *more)


def _gptq(inputs: int, size: int, bits: int, first_version: bool, tensors: dict[str, Tensor]) -> Tensor:
    groups = tensors["groups"] if "groups" in tensors else torch.arange(inputs) // size
    codes, zeros, scales = (tensors[role] for role in ("codes", "zeros", "scales"))
    return dequantize.gptq_to_plain(codes, zeros, scales, groups, bits, first_version)


def _four_bits(record: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    return dequantize.four_bits_to_plain(tensors["codes"], tensors, record)


def _plan_fp8(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    codes, scale = parts["codes"], parts["scale"]
    require(len(codes.shape) >= 2, f"{codes.name} has shape {codes.shape}, and a matrix is needed")
    size = settings.get("weight_block_size", [128, 128])
    block = (codes.shape[-2], codes.shape[-1]) if size is None else _block_size(size)
    if size is None:
        require(math.prod(scale.shape) == 1, f"{scale.name} has shape {scale.shape}, and weight_block_size is null")
    else:
        _shape_of(parts, "scale", _grid(codes.shape, block))
    return codes.shape, _computed(dequantize.blocks_to_plain, ("codes", "scale"), block)


def _plan_rows(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    codes, scale = parts["codes"], parts["scale"]
    require(len(codes.shape) == 2, f"{codes.name} has shape {codes.shape}, and a matrix is needed")
    require(scale.dtype.is_floating_point, f"{scale.name} is {dtype_name(scale.dtype)}")
    rows, columns = codes.shape
    block = None
    single, grouped = math.prod(scale.shape) == 1, len(scale.shape) == 2 and scale.shape[0] == rows
    if not single and scale.shape != (rows,) and not (grouped and columns % scale.shape[1] == 0):
        block = next((b for b in _blocks_of(settings) if _grid(codes.shape, b) == scale.shape), None)
        require(block is not None, f"{scale.name} has shape {scale.shape} for a matrix of {codes.shape}")
    if "zero" in parts:
        _shape_of(parts, "zero", scale.shape)
    return codes.shape, _computed(dequantize.rows_to_plain, ("codes", "scale", "zero"), block)


def _blocks_of(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the block sizes of the groups in a config of compressed-tensors."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("block_structure"):
            yield _block_size(weights["block_structure"])


def _plan_packed(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    codes, scale = parts["codes"], parts["scale"]
    require("group_index" not in parts, f"{codes.name} has columns in an order of their own (weight_g_idx)")
    require(math.prod(parts["shape"].shape) == 2 and len(codes.shape) == 2, f"{codes.name} is no packed matrix")
    rows, columns = load(parts["shape"]).tolist()
    bits = 32 * codes.shape[1] // columns if columns > 0 else 0
    require(bits in (4, 8), f"{codes.name} has {bits} bits for each weight, and 4 and 8 can be read")
    require(codes.shape == (rows, -(-columns * bits // 32)), f"{codes.name} has shape {codes.shape}")
    require(
        len(scale.shape) == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0,
        f"{scale.name} has shape {scale.shape} for a matrix of {(rows, columns)}",
    )
    if "zero" in parts:
        _shape_of(parts, "zero", (-(-rows * bits // 32), scale.shape[1]))
    shape = (rows, columns)
    return shape, _computed(dequantize.packed_to_plain, ("codes", "scale", "zero"), shape, bits)


def _plan_gptq(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    version = settings.get("checkpoint_format", "gptq")
    require(
        version in ("gptq", "gptq_v2"), f"its checkpoint_format is {version!r}, and gptq or gptq_v2 can be read"
    )
    bits = _whole(settings, "bits", (2, 4, 8))
    codes, scales = parts["codes"], parts["scales"]
    require(len(codes.shape) == 2 and len(scales.shape) == 2, f"{codes.name} is no packed matrix")
    inputs, outputs = codes.shape[0] * 32 // bits, codes.shape[1]
    size = settings.get("group_size", 128)
    size = inputs if size == -1 else size
    require(type(size) is int and size > 0, f"its group_size is {size!r}")
    if "groups" in parts:
        require(len(parts["groups"].shape) == 1, f"{parts['groups'].name} is no list")
        inputs = min(inputs, parts["groups"].shape[0])
    else:
        _shape_of(parts, "scales", (-(-inputs // size), outputs))
    _shape_of(parts, "scales", (scales.shape[0], outputs))
    _shape_of(parts, "zeros", (scales.shape[0], -(-outputs * bits // 32)))

    return (outputs, inputs), partial(_gptq, inputs, size, bits, version == "gptq")


def _plan_awq(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    require(version == "gemm", f"its version is {version}, and gemm can be read")
    _whole(settings, "bits" if "bits" in settings else "w_bit", (4,))
    codes, scales = parts["codes"], parts["scales"]
    require(len(codes.shape) == 2 and len(scales.shape) == 2, f"{codes.name} is no packed matrix")
    inputs, outputs = codes.shape[0], 8 * codes.shape[1]
    require(scales.shape[0] > 0 and inputs % scales.shape[0] == 0, f"{scales.name} has shape {scales.shape}")
    _shape_of(parts, "scales", (scales.shape[0], outputs))
    _shape_of(parts, "zeros", (scales.shape[0], outputs // 8))
    return (outputs, inputs), _computed(dequantize.awq_to_plain, ("codes", "zeros", "scales"))


def _plan_mxfp4(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    codes = parts["codes"]
    require(len(codes.shape) == 4 and codes.shape[3] == 16, f"{codes.name} has shape {codes.shape}")
    _shape_of(parts, "scales", codes.shape[:3])
    experts, outputs, groups, _ = codes.shape
    return (experts, 32 * groups, outputs), _computed(dequantize.mxfp4_to_plain, ("codes", "scales"))


def _plan_int8(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    codes = parts["codes"]
    require(len(codes.shape) == 2, f"{codes.name} has shape {codes.shape}, and a matrix is needed")
    _shape_of(parts, "scale", codes.shape[:1])
    return codes.shape, _computed(dequantize.int8_to_plain, ("codes", "scale"))


def _plan_four_bits(parts: Parts, settings: Mapping[str, Any], load: Load) -> Plan:
    entry = parts["record"]
    require(entry.nbytes <= MAX_RECORD, f"{entry.name} has {entry.nbytes:,} bytes")
    try:
        record = dequantize.four_bit_record(load(entry))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{entry.name} is no record of bitsandbytes: {error}") from None
    shape = tuple(record["shape"])
    numbers = math.prod(shape)
    bytes_needed = -(-numbers // 2)
    require(
        parts["codes"].nbytes == bytes_needed, f"{parts['codes'].name} has not the {bytes_needed} bytes of {shape}"
    )
    _shape_of(parts, "table", (16,))
    nested = [role in parts for role in ("nested_absmax", "nested_table")]
    require(all(nested) or not any(nested), f"{parts['codes'].name} has half of its nested scales")
    blocks = -(-numbers // record["blocksize"])
    _shape_of(parts, "absmax", (blocks,))
    if all(nested):
        require("nested_offset" in record, f"{entry.name} has no nested_offset")
        _shape_of(parts, "nested_table", (256,))
        _shape_of(parts, "nested_absmax", (-(-blocks // record["nested_blocksize"]),))
    return shape, partial(_four_bits, record)


_FP8 = Form("block FP8", "", "", FLOAT8, {"scale": "_scale_inv"}, _plan_fp8)
_QWEIGHT = {"zeros": ".qzeros", "scales": ".scales"}
_STATE = ".weight.quant_state.bitsandbytes__"
FORMS: Mapping[str, tuple[Form, ...]] = {
    "fp8": (_FP8,),
    "compressed-tensors": (
        Form(
            "FP8 (compressed-tensors)", ".weight", ".weight", FLOAT8, {"scale": ".weight_scale"}, _plan_rows
        ),
        Form(
            "INT8 (compressed-tensors)", ".weight", ".weight", (torch.int8,),
            {"scale": ".weight_scale"}, _plan_rows, {"zero": ".weight_zero_point"},
        ),
        Form(
            "packed integers (compressed-tensors)", ".weight_packed", ".weight", (torch.int32,),
            {"scale": ".weight_scale", "shape": ".weight_shape"}, _plan_packed,
            {"zero": ".weight_zero_point", "group_index": ".weight_g_idx"},
        ),
    ),
    "mxfp4": (Form("MXFP4", "_blocks", "", (torch.uint8,), {"scales": "_scales"}, _plan_mxfp4, carried=True),),
    "gptq": (Form("GPTQ", ".qweight", ".weight", (torch.int32,), _QWEIGHT, _plan_gptq, {"groups": ".g_idx"}),),
    "awq": (Form("AWQ", ".qweight", ".weight", (torch.int32,), _QWEIGHT, _plan_awq),),
    "bitsandbytes": (
        Form("INT8 (bitsandbytes)", ".weight", ".weight", (torch.int8,), {"scale": ".SCB"}, _plan_int8),
        Form(
            "four bits (bitsandbytes)", ".weight", ".weight", (torch.uint8,),
            {"absmax": ".weight.absmax", "table": ".weight.quant_map", "record": f"{_STATE}nf4|{_STATE}fp4"},
            _plan_four_bits,
            {"nested_absmax": ".weight.nested_absmax", "nested_table": ".weight.nested_quant_map"},
        ),
    ),
}  # fmt: skip
