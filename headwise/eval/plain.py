"""Dataclasses back from the plain data that `dataclasses.asdict` and JSON made of them."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def restore(kind: type[T], data: dict[str, Any]) -> T:
    """The dataclass whose fields `data` holds. Other keys are passed over, a missing one has its default."""
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(typing.cast(Any, kind))]
    return kind(**{name: _value(hints[name], data[name]) for name in names if name in data})


def _value(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (types.UnionType, typing.Union):
        return _value(arguments[0], value)
    if origin is tuple:
        return tuple(_value(arguments[0], item) for item in value)
    return restore(typing.cast(type, hint), value) if dataclasses.is_dataclass(hint) else value
