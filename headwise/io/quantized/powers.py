"""Store modules of a model times powers of two: the same function in numbers that formats of few bits can hold.

config.json names the modules and the exponents. A reader takes the powers back, so that all other code sees the
weights in their natural size; stock classes ignore the entry and compute with the weights as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headwise.errors import HeadwiseError

if TYPE_CHECKING:  # the rules about engines read the entry without torch
    from torch import Tensor

# The entry of config.json: module name -> exponent of the power that its weight is stored with.
POWERS = "powers_of_two"
MAX_EXPONENT = 64


def powers_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the exponents of a config's modules, by the last part of their names; empty without an entry.

    Args:
        config: config.json.

    Raises:
        HeadwiseError: the entry does not map names to whole numbers of at most `MAX_EXPONENT`.
    """
    entry = config.get(POWERS) or {}
    valid = isinstance(entry, dict) and all(
        isinstance(name, str) and type(exponent) is int and abs(exponent) <= MAX_EXPONENT
        for name, exponent in entry.items()
    )
    if not valid:
        raise HeadwiseError(
            f"config.json has {POWERS}: {str(entry)[:100]}, which is no table of names and exponents up to "
            f"{MAX_EXPONENT}.",
            "Take config.json from the folder that headwise wrote.",
        )
    return dict(entry)


def exponent_of(name: str, powers: Mapping[str, int]) -> int:
    """Return the exponent of the power of two that a tensor is stored with; 0: it is stored as it is.

    Args:
        name: of the tensor.
        powers: of `powers_of`.
    """
    module, _, leaf = name.rpartition(".")
    return powers.get(module.rpartition(".")[2], 0) if powers and leaf == "weight" else 0


def times_power(tensor: Tensor, exponent: int) -> Tensor:
    """Return a tensor times a power of two, which changes no digit within the range of its dtype.

    Args:
        tensor: its values.
        exponent: of the power.
    """
    return tensor * 2.0**exponent if exponent else tensor


def is_exact(tensor: Tensor, exponent: int) -> bool:
    """Return whether a tensor times a power of two keeps all digits in its dtype.

    Args:
        tensor: its values.
        exponent: of the power.
    """
    restored = times_power(times_power(tensor, exponent), -exponent)
    return not exponent or restored.nan_to_num().equal(tensor.nan_to_num())


def as_stored(name: str, tensor: Tensor, exponent: int) -> Tensor:
    """Return a tensor times the power of two that it is stored with.

    Args:
        name: of the tensor.
        tensor: its values.
        exponent: of the power.

    Raises:
        HeadwiseError: a value would become infinite, or too small for its digits.
    """
    if not is_exact(tensor, exponent):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise HeadwiseError(
            f"Tensor {name} cannot be stored times 2^{exponent} exactly in {dtype}.",
            "Leave out the engine for whose quantizers it is stored so.",
        )
    return times_power(tensor, exponent)
