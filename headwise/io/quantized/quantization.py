"""Find the quantised weights of a checkpoint, from its config and its headers.

`find_quantized` gives every tensor of the files its place in a plain weight, or refuses the checkpoint in one
sentence. The rest of the code reads plain tensors only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.format import dtype_name
from headwise.io.header import TensorEntry
from headwise.io.quantized.forms import FLOAT8, FORMS, Load, require
from headwise.io.quantized.powers import POWERS

QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")
# In which every plain tensor is read, except those that are float32 in the file.
PLAIN_DTYPE = torch.bfloat16
# Tensors beside or in place of weights, by which quantised checkpoints are known.
QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_scale(_inv)?|weight_zero_point"
    r"|weight_global_scale|input_scale|SCB|absmax|quant_map|quant_state\..*)$|_scale_inv$"
    r"|_proj_(blocks|scales)$"
)
# What static quantisation of activations stores; a plain weight has no use for it.
ACTIVATIONS = re.compile(r"\.(input|output|activation)_(scale|zero_point|global_scale)$|\.weight_format$")
# The roles of scales, and the exponent with a bias of 127 that stands for NaN.
SCALES, NAN_EXPONENT = frozenset({"scale", "scales"}), 255
DAMAGED = "The file is damaged: download the checkpoint again, or convert the one that it was quantised from."
CONVERT_ORIGINAL = "Convert the unquantised checkpoint that it was made from, then quantise the result."


@dataclass(frozen=True)
class QuantizedTensor:
    """One plain weight, and the tensors of the files that it is computed from.

    Attributes:
        name: of the plain weight.
        shape: of the plain weight.
        parts: the stored tensors, by their roles.
        compute: returns the weight from the tensors by their roles.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, TensorEntry]
    compute: Callable[[dict[str, Tensor]], Tensor]

    @property
    def peak_bytes(self) -> int:
        """Return the bytes of memory that reading it takes at most: intermediates of one matrix, and the weight."""
        return 16 * math.prod(self.shape[-2:]) + PLAIN_DTYPE.itemsize * math.prod(self.shape)

    def read(self, load: Load) -> Tensor:
        """Return the plain weight, rounded once to `PLAIN_DTYPE`.

        Args:
            load: reads a stored tensor.

        Raises:
            HeadwiseError: the stored tensors contradict each other, or a scale is NaN.
        """
        tensors = {role: load(entry) for role, entry in self.parts.items()}
        self._refuse_nan(tensors)
        try:
            values = self.compute(tensors)
        except (IndexError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            file = self.parts["codes"].file
            raise HeadwiseError(
                f"The quantised tensors of {self.name} in {file} do not fit each other: {reason}.", DAMAGED
            ) from None
        return values.to(PLAIN_DTYPE).contiguous()

    def check_scales(self, load: Load) -> None:
        """Refuse scales that are NaN in bytes, which a copy would carry over.

        Args:
            load: reads a stored tensor.

        Raises:
            HeadwiseError: a scale is NaN.
        """
        self._refuse_nan({role: load(self.parts[role]) for role in SCALES & self.parts.keys()})

    def _refuse_nan(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse the byte that is NaN among scales in bytes, which are exponents of two (E8M0)."""
        for role in SCALES & tensors.keys():
            if tensors[role].dtype == torch.uint8 and bool((tensors[role] == NAN_EXPONENT).any()):
                entry = self.parts[role]
                raise HeadwiseError(
                    f"Tensor {entry.name} in {entry.file} has a scale of {NAN_EXPONENT}, the byte for NaN.", DAMAGED
                )


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantised.

    Attributes:
        method: the `quant_method` of its config.
        settings: the quantization entry of its config.
        tensors: the quantised weights, by their plain names.
        stored: all tensors of the files, by their names there.
        entries: the plain tensors in the order of the files; what is no quantised weight is as it is stored, and
            float16 becomes `PLAIN_DTYPE`.
        kinds: in words how many weights are stored in which form.
    """

    method: str
    settings: dict[str, Any]
    tensors: dict[str, QuantizedTensor]
    stored: dict[str, TensorEntry]
    entries: dict[str, TensorEntry]
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """A line of a plan about what is read."""
        listed = ", ".join(f"{count:,} in {kind}" for kind, count in self.kinds.items())
        return (
            f"The source is quantised ({self.method}): {listed}. Each weight is dequantised as its stock loader "
            f"does, and read in {dtype_name(PLAIN_DTYPE)}."
        )


def quantization_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the method and the settings of a config's quantization entry; None without one.

    Args:
        config: config.json.

    Raises:
        HeadwiseError: the entry names a method that cannot be read.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION_KEYS:
            settings = part.get(key)
            if not settings:
                continue
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            if isinstance(settings, dict) and method in FORMS:
                return str(method), settings
            named = "no method by its quant_method"
            if isinstance(method, str):
                named = f"the method {method}"
            elif isinstance(settings, dict) and {"bits", "group_size"} <= settings.keys():
                named = "no method, as MLX writes it"
            raise HeadwiseError(
                f"config.json has {key}, which names {named}, and headwise reads {', '.join(FORMS)}.",
                CONVERT_ORIGINAL,
            )
    return None


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without its entries about how weights are stored; the same object if it has none.

    Args:
        config: config.json.

    Raises:
        HeadwiseError: the entry names a method that cannot be read.
    """
    config = {k: v for k, v in config.items() if k != POWERS} if POWERS in config else config
    if quantization_of(config) is None:
        return config
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in QUANTIZATION_KEYS}
    for part in (plain, plain.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in ("float16", "auto"):  # every plain tensor is read in another
                part[key] = dtype_name(PLAIN_DTYPE)
    return plain


def find_quantized(
    source: str, config: Mapping[str, Any], stored: dict[str, TensorEntry], load: Load
) -> Quantization | None:
    """Give every tensor of a quantised checkpoint its place in a plain weight.

    Args:
        source: the user's name of the checkpoint.
        config: config.json.
        stored: the tensors of its files, by name.
        load: reads a stored tensor. Only records and shapes of a few bytes are read.

    Returns:
        The quantised weights and the plain tensors; None for a checkpoint that is not quantised.

    Raises:
        HeadwiseError: it has quantised tensors that cannot be read.
    """
    named = quantization_of(config)
    if named is None:
        for name, entry in stored.items():
            if _is_quantised(name, entry):
                raise _unnamed(source, name)
        return None
    method, settings = named
    weights: dict[str, QuantizedTensor] = {}
    places: dict[str, str] = {}  # plain name by the name of the codes
    kinds: dict[str, int] = {}
    consumed: set[str] = set()
    for name, entry in stored.items():
        try:
            for form in FORMS[method]:
                found = form.find(name, entry, stored)
                if found is None:
                    continue
                plain, parts = found
                shape, compute = form.plan(parts, settings, load)
                require(plain in (name, *parts) or plain not in stored, f"{plain} is in the files as well")
                weights[plain] = QuantizedTensor(plain, tuple(shape), parts, compute)
                places[name] = plain
                kinds[form.kind] = kinds.get(form.kind, 0) + 1
                consumed |= {part.name for part in parts.values()}
                break
        except ValueError as error:
            raise HeadwiseError(
                f"{source}: the quantised weight {name} cannot be read: {error}.", CONVERT_ORIGINAL
            ) from None
    rest = {name: entry for name, entry in stored.items() if name not in consumed and not ACTIVATIONS.search(name)}
    for name, entry in rest.items():
        if _is_quantised(name, entry):
            raise HeadwiseError(
                f"{source} mixes quantisations: tensor {name} ({dtype_name(entry.dtype)}) belongs to no weight of "
                f"the method {method}, which config.json names.",
                CONVERT_ORIGINAL,
            )
    if not weights:
        raise HeadwiseError(
            f"config.json of {source} names the quantisation {method}, and no tensor is quantised.",
            "If the weights are plain, remove the quantization entry from config.json.",
        )
    return Quantization(method, settings, weights, stored, _plain_entries(weights, places, rest, stored), kinds)


def refuse_quantised_names(source: str, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose config is plain and whose tensor names are those of quantised weights.

    Args:
        source: the user's name of the checkpoint.
        names: of its tensors.

    Raises:
        HeadwiseError: it is quantised.
    """
    for name in names:
        if QUANTISED.search(name):
            raise _unnamed(source, name)


def _is_quantised(name: str, entry: TensorEntry) -> bool:
    return bool(QUANTISED.search(name)) or entry.dtype in FLOAT8


def _unnamed(source: str, name: str) -> HeadwiseError:
    return HeadwiseError(
        f"{source} has quantised weights (tensor {name}), and config.json has no quantization_config.",
        CONVERT_ORIGINAL,
    )


def _plain_entries(
    weights: Mapping[str, QuantizedTensor],
    places: Mapping[str, str],
    rest: Mapping[str, TensorEntry],
    stored: Mapping[str, TensorEntry],
) -> dict[str, TensorEntry]:
    """Return the entries of the plain tensors, in the order of the files. A weight is where its codes are."""
    entries = {}
    for name, entry in stored.items():
        if name in places:
            plain = places[name]
            entries[plain] = TensorEntry(plain, PLAIN_DTYPE, weights[plain].shape, entry.file, entry.offset)
        elif name in rest:
            dtype = PLAIN_DTYPE if entry.dtype == torch.float16 else entry.dtype
            entries[name] = TensorEntry(name, dtype, entry.shape, entry.file, entry.offset)
    return entries
