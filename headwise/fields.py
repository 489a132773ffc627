"""Declare the fields of settings objects: default, legal values, help and the layouts a field acts with.

A settings class is a frozen dataclass of such fields. `check_fields` validates them when the object is made, so
that Python, YAML and the command line have the same rules and messages. Messages name fields in backquotes, and the
command line replaces the names with its flags. This module imports no other package than the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headwise.errors import SettingError
from headwise.format import parse_bytes, parse_length

LONGEST_VALUE = 200  # characters of a value in a message
CLOSE = 0.65  # likeness of two words from which a message suggests the other one


class Setting:
    """The rules and the description of one field.

    Attributes:
        help: one sentence for help pages.
        wanted: ends the sentence "`field` is VALUE, which is not ...".
        check: returns the legal form of a Python value, or raises ValueError.
        parse: returns the Python value of a word of the command line, or raises ValueError.
        choices: legal words, for shell completion and suggestions.
        metavar: the placeholder in help pages.
        section: the heading in help pages.
        acts_with: the values of `to` with which the field has an effect; empty: all of them.
        flag: the spelling on the command line, where it does not follow from the field's name.
        recorded: whether headwise.json keeps the value.
        multiple: whether the flag may be repeated.
    """

    def __init__(
        self,
        help: str,
        *,
        wanted: str = "",
        check: Callable[[Any], Any] = lambda value: value,
        parse: Callable[[str], Any] = lambda word: word,
        choices: Sequence[str] = (),
        metavar: str = "",
        section: str = "Options",
        acts_with: Sequence[str] = (),
        flag: str | None = None,
        recorded: bool = True,
        multiple: bool = False,
    ) -> None:
        self.help, self.wanted, self.check, self.parse = help, wanted, check, parse
        self.choices, self.metavar, self.section = tuple(choices), metavar, section
        self.acts_with, self.flag, self.recorded, self.multiple = tuple(acts_with), flag, recorded, multiple

    @property
    def is_flag(self) -> bool:
        """Whether the option takes no value."""
        return self.metavar == "FLAG"


def declare(default: Any, setting: Setting) -> Any:
    """Return a dataclass field with its setting.

    Args:
        default: of the field.
        setting: its rules and description.
    """
    return field(default=default, metadata={"setting": setting})


def settings_of(kind: Any) -> dict[str, tuple[Field[Any], Setting]]:
    """Return the declared fields by name.

    Args:
        kind: a settings class, or an object of one.
    """
    return {f.name: (f, f.metadata["setting"]) for f in fields(kind) if "setting" in f.metadata}


def flag_of(name: str, setting: Setting | None = None) -> str:
    """Return the spelling of a field on the command line: rope_dim -> "--rope-dim".

    Args:
        name: of the field.
        setting: its rules; None: the spelling follows from the name.
    """
    return (setting and setting.flag) or "--" + name.replace("_", "-")


def is_given(settings: Any, name: str) -> bool:
    """Return whether a field differs from its default.

    Args:
        settings: a settings object.
        name: of the field.
    """
    declared = next(f for f in fields(settings) if f.name == name)
    value = getattr(settings, name)
    return value is not declared.default and value != declared.default


def check_fields(settings: Any) -> None:
    """Replace every field of a new settings object with its legal form.

    Args:
        settings: a settings object, in its `__post_init__`.

    Raises:
        SettingError: a value is not legal; the message names the field, the value and what is legal.
    """
    for name, (_, setting) in settings_of(settings).items():
        if not is_given(settings, name):
            continue
        value = getattr(settings, name)
        try:
            legal = setting.check(value)
        except (ValueError, TypeError, OverflowError):
            words = value if setting.multiple and isinstance(value, list | tuple) else [value]
            names = [str(word).partition("=")[0] for word in words]
            wrong = [name.casefold() for name in names if name not in setting.choices]
            longer = [choice for word in wrong if word for choice in setting.choices if choice.startswith(word)]
            alike = [match for word in wrong for match in get_close_matches(word, setting.choices, 1, CLOSE)]
            close = longer or alike
            hint = f"Did you mean {close[0]!r}?" if close else None
            shown = ", ".join(repr(str(word) if isinstance(word, Path) else word) for word in words)
            shown = shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]}..."
            raise SettingError(name, f"`{name}` is {shown}, which is not {setting.wanted}.", hint) from None
        object.__setattr__(settings, name, legal)


def text(help: str, *, metavar: str, default: str | None = None, **more: Any) -> Any:
    """Declare a field that takes any text.

    Args:
        help: one sentence for help pages.
        metavar: the placeholder in help pages.
        default: of the field.
        **more: further arguments of `Setting`.
    """

    def check(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    return declare(default, Setting(help, wanted="a text", check=check, metavar=metavar, **more))


def model(help: str, **more: Any) -> Any:
    """Declare a field that takes a model: a path, or a name on the Hub.

    Args:
        help: one sentence for help pages.
        **more: further arguments of `Setting`.
    """

    def check(value: Any) -> str | Path:
        if not isinstance(value, str | Path) or not str(value):
            raise ValueError
        return value

    default = more.pop("default", None)
    wanted = "a folder or a Hub repository"
    return declare(default, Setting(help, wanted=wanted, check=check, metavar="MODEL", **more))


def device(help: str = "cpu, cuda or cuda:N [a GPU if there is one].", **more: Any) -> Any:
    """Declare a field that takes the name of a device.

    Args:
        help: one sentence for help pages.
        **more: further arguments of `Setting`.
    """
    return text(help, metavar="DEVICE", **more)


def devices(help: str = "cpu, cuda or cuda:N, or a list such as cuda:0,cuda:1 [a GPU if there is one].") -> Any:
    """Declare a field that takes one device or a list of devices of one kind, with commas.

    Args:
        help: one sentence for help pages.
    """

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        names = [name.strip() for name in value.split(",")]
        places = ["cuda:0" if name == "cuda" else name for name in names]
        kinds = {name.partition(":")[0] for name in names}
        if "" in names or len(kinds) > 1 or (kinds != {"cpu"} and len(set(places)) < len(places)):
            raise ValueError
        return ",".join(names)

    wanted = "a device, or a list of devices of one kind that names each GPU once, such as cuda:0,cuda:1"
    return declare(None, Setting(help, wanted=wanted, check=check, metavar="DEVICES", recorded=False))


def folder(help: str, *, metavar: str, wanted: str = "the path of a folder", **more: Any) -> Any:
    """Declare a field that takes the path of a folder, or of a file; the object holds a `Path`.

    Args:
        help: one sentence for help pages.
        metavar: the placeholder in help pages.
        wanted: what is legal, for messages.
        **more: further arguments of `Setting`.
    """

    def check(value: Any) -> Path:
        if not isinstance(value, str | Path) or not str(value):
            raise ValueError
        return Path(value)

    return declare(None, Setting(help, wanted=wanted, check=check, parse=Path, metavar=metavar, **more))


def flag(help: str, *, default: bool = False, **more: Any) -> Any:
    """Declare a field that is True or False; the flag on the command line inverts the default.

    Args:
        help: one sentence for help pages.
        default: of the field.
        **more: further arguments of `Setting`.
    """

    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return declare(default, Setting(help, wanted="True or False", check=check, metavar="FLAG", **more))


def whole_number(value: Any, minimum: int = 1, parse: Callable[[str], int] | None = parse_length) -> int:
    """Return a whole number that is given as a number, or as a text such as 8K.

    Args:
        value: of a field.
        minimum: the smallest legal number.
        parse: returns the number of a text; None: a text is not legal.

    Raises:
        ValueError: the value is not such a number.
    """
    number = parse(value) if parse and isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or number < minimum:
        raise ValueError
    return int(number)


def number(help: str, *, minimum: int = 1, default: int | None = None, **more: Any) -> Any:
    """Declare a field that takes a whole number of at least `minimum`.

    Args:
        help: one sentence for help pages.
        minimum: the smallest legal number.
        default: of the field.
        **more: further arguments of `Setting`. With a `parse` of its own, the field also takes texts such as 40K.
    """
    options: dict[str, Any] = {"parse": int, "metavar": "N", **more}
    parse = options["parse"]

    def check(value: Any) -> int:
        return whole_number(value, minimum, None if parse is int else parse)

    short = {int: "", parse_length: ", such as 8192 or 8K"}.get(parse, ", such as 40000, 40K or 21M")
    wanted = f"a whole number of at least {minimum}{short}"
    return declare(default, Setting(help, wanted=wanted, check=check, **options))


def length(help: str, **more: Any) -> Any:
    """Declare a field that takes the tokens of a sequence, as a number or as a text: 8K is 8,192.

    Args:
        help: one sentence for help pages.
        **more: further arguments of `number`.
    """
    return number(help, parse=parse_length, **more)


def positive(
    help: str, *, metavar: str = "NUMBER", default: float | None = None, zero: bool = False, **more: Any
) -> Any:
    """Declare a field that takes a finite number above 0 (or from 0, with `zero`).

    Args:
        help: one sentence for help pages.
        metavar: the placeholder in help pages.
        default: of the field.
        zero: whether 0 is legal.
        **more: further arguments of `Setting`.
    """

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError
        if not value and not zero:
            raise ValueError
        return float(value)

    wanted = "a number of at least 0" if zero else "a number above 0"
    return declare(default, Setting(help, wanted=wanted, check=check, parse=float, metavar=metavar, **more))


def memory(help: str, **more: Any) -> Any:
    """Declare a field that takes an amount of memory; the object holds bytes.

    Args:
        help: one sentence for help pages.
        **more: further arguments of `Setting`.
    """

    def check(value: Any) -> int:
        number = parse_bytes(value)
        if isinstance(value, bool) or number < 1:
            raise ValueError
        return number

    return declare(None, Setting(help, wanted="a size such as 80GB", check=check, metavar="SIZE", **more))


def parse_fraction(word: str) -> float:
    """Return 0.125 for "12.5%" or "0.125".

    Args:
        word: of the command line.

    Raises:
        ValueError: the word is not a number.
    """
    return float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)


def fraction(
    help: str, *, metavar: str = "FRACTION", default: float | None = None, zero: bool = False, **more: Any
) -> Any:
    """Declare a field that takes a fraction above 0 (or from 0, with `zero`) and up to 1, or a text such as 12.5%.

    Args:
        help: one sentence for help pages.
        metavar: the placeholder in help pages.
        default: of the field.
        zero: whether 0 is legal.
        **more: further arguments of `Setting`.
    """

    def check(value: Any) -> float:
        value = parse_fraction(value) if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not (value >= 0 if zero else value > 0) or value > 1:
            raise ValueError
        return float(value)

    wanted = f"a fraction {'from' if zero else 'above'} 0 and up to 1 (100%), such as 0.125 or 12.5%"
    return declare(
        default, Setting(help, wanted=wanted, check=check, parse=parse_fraction, metavar=metavar, **more)
    )


def choice(help: str, choices: Sequence[str], *, default: str | None = None, metavar: str = "", **more: Any) -> Any:
    """Declare a field that takes one of `choices`.

    Args:
        help: one sentence for help pages.
        choices: the legal values.
        default: of the field.
        metavar: the placeholder in help pages.
        **more: further arguments of `Setting`.
    """
    legal = tuple(dict.fromkeys(choices))

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in legal:
            raise ValueError
        return value

    wanted = f"one of {', '.join(legal)}"
    shown = metavar or "[" + "|".join(legal) + "]"
    return declare(default, Setting(help, wanted=wanted, check=check, choices=legal, metavar=shown, **more))


def other(
    help: str, *, check: Callable[[Any], Any], wanted: str, metavar: str, parse: Callable[[str], Any], **more: Any
) -> Any:
    """Declare a field whose legal values a function decides.

    Args:
        help: one sentence for help pages.
        check: returns the legal form of a value, or raises ValueError.
        wanted: ends the sentence "`field` is VALUE, which is not ...".
        metavar: the placeholder in help pages.
        parse: returns the value of a word of the command line, or raises ValueError.
        **more: further arguments of `Setting`.
    """
    default = more.pop("default", None)
    return declare(default, Setting(help, wanted=wanted, check=check, parse=parse, metavar=metavar, **more))


def word_or_number(help: str, words: Sequence[str], *, metavar: str, **more: Any) -> Any:
    """Declare a field that takes one of some words, or a whole number of at least 1.

    Args:
        help: one sentence for help pages.
        words: the legal words.
        metavar: the placeholder in help pages.
        **more: further arguments of `Setting`, among them `wanted`.
    """

    def check(value: Any) -> str | int:
        if value in words:
            return str(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError
        return value

    return other(
        help, check=check, parse=lambda word: word if word in words else int(word), metavar=metavar, **more
    )


def several(help: str, choices: Sequence[str], *, metavar: str, **more: Any) -> Any:
    """Declare a field that takes any number of `choices`; the flag on the command line may be repeated.

    Args:
        help: one sentence for help pages.
        choices: the legal values.
        metavar: the placeholder in help pages.
        **more: further arguments of `Setting`.
    """
    legal = tuple(choices)

    def check(value: Any) -> tuple[str, ...]:
        values = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(each, str) and each in legal for each in values):
            raise ValueError
        return tuple(dict.fromkeys(values))

    wanted = f"one or several of {', '.join(legal)}"
    return declare(
        (), Setting(help, wanted=wanted, check=check, choices=legal, metavar=metavar, multiple=True, **more)
    )
