"""A checked dataclass from a mapping of YAML. The checks are read off the dataclass's own type hints.

A wrong key is answered with the nearest right one, a wrong value with the path of its key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar

import yaml

from headwise.errors import HeadwiseError

HUGE = 1e300

T = TypeVar("T")


class _Plain(yaml.SafeLoader):
    """Plain values, and no aliases: with them, ten lines stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)


def parse(text: str) -> Any:
    """A YAML value; ValueError in one line where there is none."""
    try:
        return _Plain(text).get_single_data()
    # Besides its own errors, the library lets through what its conversions of odd numbers, dates and tags raise.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def build(kind: type[T], mapping: dict[str, Any], where: str, prefix: str = "") -> T:
    """A dataclass from a mapping, each value checked against its field's type.

    Raises:
        HeadwiseError: naming `where` and the dotted path of the key.
    """
    assert dataclasses.is_dataclass(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in mapping:
        if key not in fields:
            raise HeadwiseError(
                f"{where}: unknown key {prefix}{key}.",
                f"{guess(str(key), fields, prefix)}Known here: {', '.join(fields)}.",
            )
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            raise HeadwiseError(f"{where}: {prefix}{name} is missing.")
    values = {key: _check(hints[key], value, where, f"{prefix}{key}") for key, value in mapping.items()}
    return typing.cast(T, kind(**values))


def _check(hint: Any, value: Any, where: str, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _check(next(kind for kind in arguments if kind is not type(None)), value, where, path)
    if origin is Literal:
        if value in arguments:
            return value
        raise wrong(where, path, f"one of {', '.join(map(str, arguments))}", value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong(where, path, "a mapping", value)
        return build(typing.cast(type, hint), value, where, f"{path}.")
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong(where, path, "a mapping", value)
        return {str(key): _check(arguments[1], item, where, f"{path}.{key}") for key, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise wrong(where, path, "a list", value)
        return [_check(arguments[0], item, where, f"{path}.{index}") for index, item in enumerate(value)]
    return _scalar(hint, value, where, path)


def _scalar(hint: Any, value: Any, where: str, path: str) -> Any:
    number = _number(value)
    if hint is int and number is not None and number == int(number):
        return int(number)
    if hint is float and number is not None:
        return float(number)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    wanted = {
        int: "a whole number (21000000 or 21M)",
        float: "a number",
        bool: "true or false",
        str: "text",
    }[hint]
    raise wrong(where, path, wanted, value)


def _number(value: Any) -> float | None:
    """YAML reads 3e-4 as text and knows no 21M and no 5%; people write all of them."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value if -HUGE < value < HUGE else None
    match = re.fullmatch(r"([+-]?[\d.]+(?:e[+-]?\d+)?)([kMBT%]?)", value) if isinstance(value, str) else None
    scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "%": 0.01}
    try:
        return _number(float(match[1]) * scale[match[2]]) if match else None
    except ValueError:
        return None


def wrong(where: str, path: str, wanted: str, value: Any) -> HeadwiseError:
    return HeadwiseError(f"{where}: {path} must be {wanted}, got {reprlib.repr(value)}.")


def guess(key: str, known: Any, prefix: str = "") -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"Did you mean {prefix}{near[0]}? " if near else ""
