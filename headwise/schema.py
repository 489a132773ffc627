"""Build checked dataclasses from YAML, from `a.b=c` assignments and from JSON records: the one loader.

`build` reads the types off the dataclass. Where a field is declared with `headwise.fields`, the dataclass itself
judges the value when it is made, so Python, YAML and the command line meet the same rules. Every error names the
dotted path of the key and its value; a misspelt key gets the nearest known one as a hint.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from headwise.errors import HeadwiseError, SettingError
from headwise.format import parse_length

MAX_BYTES = 1_000_000
# Numbers beyond it become infinite somewhere.
HUGE = 1e300
MAX_DIGITS = 100
MAX_DEPTH = 32
SCALES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "%": 0.01}

T = TypeVar("T")


def parse_yaml(text: str) -> Any:
    """Return the plain value of a YAML text.

    Aliases are refused, because ten lines of them can stand for a billion values. Deep nesting is refused, because
    the parser's time grows with the square of the depth.

    Raises:
        ValueError: the text is not YAML; the message is one line.
    """
    import yaml  # takes longer to import than `headwise --help` may

    class PlainLoader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not allowed")
            if self.depth == MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_number(self, node: Any) -> Any:
            """Return a number; text if it is of base 60 (1:30) or longer than any number of a recipe."""
            if ":" in node.value or len(node.value) > MAX_DIGITS:
                return self.construct_scalar(node)
            whole = node.tag.endswith(":int")
            return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)

        def construct_bool(self, node: Any) -> Any:
            """Return true and false as YAML 1.2 knows them: `no` is text, the language code of Norwegian."""
            return node.value.lower() == "true" if node.value.lower() in ("true", "false") else node.value

    for kind in ("int", "float"):
        PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_number)
    PlainLoader.add_constructor("tag:yaml.org,2002:bool", PlainLoader.construct_bool)
    try:
        return PlainLoader(text).get_single_data()
    # Besides its own errors, the library lets through what its conversions of odd numbers, dates and tags raise.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        HeadwiseError: the file is too large, is not YAML, or holds something else.
    """
    if path.stat().st_size > MAX_BYTES:
        raise HeadwiseError(f"{path} is larger than {MAX_BYTES:,} bytes, so it is not a recipe.")
    try:
        mapping = parse_yaml(path.read_bytes().decode())
    except ValueError as error:
        raise HeadwiseError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(mapping, dict):
        raise HeadwiseError(f"{path} is not a recipe: its top level must be a mapping.")
    return mapping


def find_file(recipe: str | Path, library: Path) -> Path:
    """Return the file of a recipe that is given by its path or by its name in a library folder.

    Raises:
        HeadwiseError: there is no such file; the hint lists the names of the library.
    """
    for path in (Path(recipe), library / f"{recipe}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in library.glob("*.yaml"))
    raise HeadwiseError(
        f"There is no recipe {str(recipe)!r}.", f"{nearest(str(recipe), names)}The library has: {', '.join(names)}."
    )


def load_file(kind: type[T], path: Path, assignments: Sequence[str] = ()) -> T:
    """Read a dataclass from a YAML file, with `a.b=c` assignments laid over it.

    Args:
        kind: the dataclass.
        path: the file.
        assignments: dotted keys with YAML values; later ones win.

    Raises:
        HeadwiseError: the file is not a YAML mapping.
        SettingError: an assignment has the wrong form, a key is unknown or missing, or a value is not legal.
    """
    return build(kind, assign(read_mapping(path), assignments), str(path), assignments)


def assign(mapping: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Lay `a.b=c` assignments over a mapping, in place, and return it.

    Args:
        mapping: plain data.
        assignments: dotted keys with YAML values; later ones win.

    Raises:
        SettingError: an assignment has no "=", its value is not YAML, or its key lies inside a plain value.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise SettingError(key, f"{assignment} is not of the form a.b=c.", "For example: train.tokens=21M")
        try:
            value = parse_yaml(text)
        except ValueError:
            raise SettingError(key, f"{assignment}: {text!r} is not a YAML value.") from None
        *parents, last = key.split(".")
        place = mapping
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise SettingError(key, f"{assignment}: {parent} is a plain value and has no keys.")
        place[last] = value
    return mapping


def build(kind: type[T], mapping: dict[str, Any], where: str = "", assignments: Iterable[str] = ()) -> T:
    """Return the dataclass of a mapping, every value checked.

    Args:
        kind: the dataclass; it may hold others, lists and mappings.
        mapping: plain data. Numbers may be written as people write them: 21M, 3e-4, 5%.
        where: the file, for error messages.
        assignments: those that were laid over `mapping`; an error in one of them names `settings`, not the file.

    Raises:
        SettingError: a key is unknown or missing, or a value is not legal; names the dotted path of the key.
    """
    try:
        return _build(kind, mapping, "")
    except SettingError as error:
        key, assigned = f"{error.field}.", [f"{text.partition('=')[0].strip()}." for text in assignments]
        place = "`settings`" if any(key.startswith(a) or a.startswith(key) for a in assigned) else where
        raise SettingError(
            error.field, f"{place}: {error.message}" if place else error.message, error.hint
        ) from None


def _build(kind: type[T], mapping: dict[str, Any], prefix: str) -> T:
    fields = {item.name: item for item in dataclasses.fields(typing.cast(Any, kind)) if item.init}
    hints = typing.get_type_hints(kind)
    for key in mapping:
        if key not in fields:
            path = f"{prefix}{key}"
            known = f"{nearest(str(key), fields, prefix)}Known here: {', '.join(fields)}."
            raise SettingError(path, f"unknown key {path}.", known)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            raise SettingError(f"{prefix}{name}", f"{prefix}{name} is missing.")
    values = {}
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        declared = fields[key].metadata.get("setting")
        # A length has a K of its own: 8K is 8,192.
        own = declared and isinstance(value, str) and declared.parse is parse_length
        values[key] = value if own else _plain(hints[key], value) if declared else _checked(hints[key], value, path)
    try:
        return kind(**values)
    except SettingError as error:
        raise _with_prefix(error, prefix, fields) from None


def _with_prefix(error: SettingError, prefix: str, fields: Iterable[str]) -> SettingError:
    """Return the error of a section with the section's path before its fields."""

    def add(text: str) -> str:
        return re.sub(r"`(\w+)([.\w]*)`", lambda m: f"`{prefix if m[1] in fields else ''}{m[1]}{m[2]}`", text)

    return SettingError(f"{prefix}{error.field}", add(error.message), error.hint and add(error.hint))


def _plain(hint: Any, value: Any) -> Any:
    """Return a value with its numbers as Python numbers, where the hint has numbers; anything else as it is."""
    hint, origin, arguments = _unwrapped(hint)
    if hint in (int, float):
        return _as_number(hint, value)
    if origin in (list, tuple, Sequence) and isinstance(value, list):
        return [_plain(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: _plain(arguments[1], item) for key, item in value.items()}
    return value


def _as_number(kind: type, value: Any) -> Any:
    number = _number(value)
    if number is None or (kind is int and number != int(number)):
        return value
    return kind(number)


def _checked(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    optional = types.NoneType in typing.get_args(hint)
    if value is None and optional:
        return None
    hint, origin, arguments = _unwrapped(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise not_legal(path, value, f"one of {', '.join(map(str, arguments))}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise not_legal(path, value, "a mapping")
        return _build(typing.cast(type, hint), value, f"{path}.")
    if origin is dict:
        if not isinstance(value, dict):
            raise not_legal(path, value, "a mapping")
        return {str(key): _checked(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise not_legal(path, value, "a list")
        return origin(_checked(arguments[0], item, f"{path}.{index}") for index, item in enumerate(value))
    value = _as_number(hint, value) if hint in (int, float) else value
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = {int: "a whole number (21000000 or 21M)", float: "a number", bool: "true or false", str: "a text"}
    raise not_legal(path, value, wanted[hint])


def _unwrapped(hint: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return a type hint without its `| None`, its origin and its arguments."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint, typing.get_origin(hint), typing.get_args(hint)


def _number(value: Any) -> float | None:
    """Return the number of 21M, 5% or 3e-4, which YAML reads as text; None if it is not a finite number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value if -HUGE < value < HUGE else None
    match = re.fullmatch(r"([+-]?[\d.]+(?:e[+-]?\d+)?)([kKMBT%]?)", value) if isinstance(value, str) else None
    try:
        return _number(float(match[1]) * SCALES[match[2]]) if match else None
    except ValueError:
        return None


def parse_count(word: str) -> int:
    """Return 21,000,000 for "21M".

    Raises:
        ValueError: the word is not a whole number.
    """
    number = _number(word)
    if number is None or number != round(number):
        raise ValueError
    return round(number)


def not_legal(path: str, value: Any, wanted: str) -> SettingError:
    """Return the error of a value that does not have the type of its key."""
    return SettingError(path, f"`{path}` is {reprlib.repr(value)}, which is not {wanted}.")


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "Did you mean ...? " with the known key that is nearest, or nothing."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"Did you mean {prefix}{near[0]}? " if near else ""


def restore(kind: type[T], data: dict[str, Any]) -> T:
    """Return the dataclass that `dataclasses.asdict` and JSON turned into `data`.

    Args:
        kind: the dataclass; it may hold others, tuples and mappings.
        data: its fields. Unknown keys are passed over and missing fields get their defaults, because the record may
            be of another version. None, which JSON has for NaN, is NaN where a number is needed.

    Raises:
        TypeError: a value does not have the type of its field, or a field without default is missing.
    """
    return typing.cast(T, _restored(kind, data, ""))


def _restored(hint: Any, value: Any, path: str) -> Any:
    optional = types.NoneType in typing.get_args(hint)
    if hint is Any or (value is None and optional):
        return value
    hint, origin, arguments = _unwrapped(hint)
    if hint is float and value is None:
        return math.nan
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        names = [item.name for item in dataclasses.fields(hint) if item.name in value]
        return typing.cast(Any, hint)(**{n: _restored(hints[n], value[n], f"{path}.{n}") for n in names})
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_restored(arguments[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _restored(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint in (int, float):
        if isinstance(value, int | float) and _number(value) == value and (hint is float or value == int(value)):
            return value
    elif origin is Literal:  # another version may know other words
        if isinstance(value, tuple(map(type, arguments))):
            return value
    elif origin is None and isinstance(value, hint):
        return value
    raise TypeError(f"`{path[1:]}` is {reprlib.repr(value)}, which is not {getattr(hint, '__name__', hint)}")
