"""What a stranger could have done to a file: seeded changes of bytes, of JSON trees and of text.

Every function takes a `random.Random`. The long run seeds one per input, so that any input can be made again from
its number; hypothesis hands in its own, and shrinks what it drew.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

ESCAPES = [
    "\x1b[2J\x1b[31mowned",
    "\x1b]0;title\x07",
    "a\rb",
    "x\u202ey",
    "line\nbreak",
    "nul\0",
    "\ud800",
    "\x9b1m",
]
WORDS = [
    *ESCAPES,
    "",
    " ",
    "auto",
    "null",
    "float8_e4m3fn",
    "float32",
    "load",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "{layer}",
    "{0.__class__}",
    "%s%n",
    "a" * 5000,
    "model.layers.0.self_attn.q_proj.weight",
    "llama",
    "mixtral",
    "deepseek_v3",
    "LlamaForCausalLM",
    "yarn",
    "dynamic",
    "longrope",
    "sliding_attention",
]
NUMBERS = [
    *(-1, 0, 1, 2, 3, 7, 255, 4096, 65_536, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *(-(2**31), -(2**63), 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
]


def nested(depth: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Callable[[Random], Any]] = [
    lambda random: random.choice(NUMBERS),
    lambda random: random.choice(NUMBERS),
    lambda random: random.choice(WORDS),
    lambda random: random.choice([None, True, False, [], {}, [[]], {"": {}}, [None], [{}]]),
    lambda random: nested(random.choice([3, 60, 400])),
    lambda random: [random.choice(NUMBERS) for _ in range(random.randrange(12))],
    lambda random: {random.choice(WORDS): random.choice(NUMBERS) for _ in range(random.randrange(4))},
]


def tree(random: Random, value: Any, keys: list[str] | None = None) -> Any:
    """A JSON value with one to four of its places changed. `keys` are names worth adding."""
    value = copy.deepcopy(value)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        places = list(_places(value))
        if not places:
            return random.choice(VALUES)(random)
        parent, key = random.choice(places)
        _change(random, parent, key, keys or [])
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _change(random: Random, parent: Any, key: Any, keys: list[str]) -> None:
    old = parent[key]
    what = random.randrange(8)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[random.choice(keys or WORDS)] = random.choice(VALUES)(random)
    elif what == 2 and isinstance(parent, dict):
        parent[random.choice(WORDS)] = parent.pop(key)
    elif what == 3 and isinstance(old, int | float):
        parent[key] = random.choice([old + 1, old - 1, -old, old * 2, old * 1000, old / 3, str(old), [old]])
    elif what == 4:
        other = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], old
    elif what == 5 and isinstance(old, list):
        parent[key] = old * random.choice([0, 2, 50])
    else:
        parent[key] = random.choice(VALUES)(random)


def dumps(value: Any) -> str:
    """JSON as Python writes it: with NaN, infinities and lone surrogates."""
    return json.dumps(value, ensure_ascii=True)


def garble(random: Random, text: str) -> str:
    """Text with a word doubled, lost, moved, nested or replaced."""
    for _ in range(random.choice([1, 1, 3])):
        start = random.randrange(len(text) + 1)
        end = min(len(text), start + random.choice([0, 1, 5, 40]))
        what = random.choice(
            [
                text[start:end] * 2,
                random.choice(WORDS),
                random.choice('{}[]":,\\\0&*!|>-#\t\r\n'),
                random.choice(["[", "{", '{"a":', "- ", "&a [*a", "!!python/object/apply:os.system "])
                * random.choice([1, 3, 2000]),
                "9" * random.choice([20, 400, 6000]),
                random.choice(["NaN", "-Infinity", "1e999", "2001-99-99", "0x", "1_0", "\\ud800", "\\u0000"]),
                "",
            ]
        )
        text = text[:start] + what + text[end:]
    return text


def flip(random: Random, content: bytes) -> bytes:
    """Bytes with some of them changed, cut off, doubled or put in."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8])):
        at = random.randrange(len(data) + 1)
        what = random.randrange(6)
        if what == 0:
            del data[at:]
        elif what == 1:
            del data[at : at + random.choice([1, 2, 8, 64])]
        elif what == 2:
            data[at:at] = data[at : at + random.choice([1, 8, 64])]
        elif what == 3:
            data[at:at] = random.randbytes(random.choice([1, 4, 32]))
        elif what == 4:
            length = random.choice([1, 2, 4, 8])
            number = random.choice([0, 1, 0x7F, 0xFF, 2**31, 2**63, 2**64 - 1])
            data[at : at + length] = (number % (1 << 8 * length)).to_bytes(length, "little")
        elif at < len(data):
            data[at] ^= 1 << random.randrange(8)
    return bytes(data)
