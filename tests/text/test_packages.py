"""Packages: only plainly permissive licences pass, and vendored copies are left out."""

from __future__ import annotations

from email.message import Message
from typing import Any

import pytest

from headwise.text import packages


def licensed(**fields: str | list[str]) -> Message:
    metadata = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            metadata[name.replace("_", "-")] = value
    return metadata


@pytest.mark.parametrize(
    ("fields", "permissive"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "Apache-2.0 OR BSD-2-Clause"}, True),
        ({"License_Expression": "MIT AND MPL-2.0"}, False),
        ({"License_Expression": "BSD-3-Clause AND Zlib", "License": "MIT"}, False),
        ({"License_Expression": "Apache-2.0 WITH LLVM-exception"}, False),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, True),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "License :: Other/Proprietary License"]}, False),
        (
            {"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "License": "MIT"},
            False,
        ),
        ({"License": "Apache 2.0 License"}, True),
        ({"License": "MPL-2.0 AND MIT"}, False),
        ({"License": "MIT or GPL"}, False),
        ({"License": "Mitsubishi proprietary"}, False),
        ({"Classifier": "Programming Language :: Python"}, False),
    ],
)
def test_only_plainly_permissive_licences_pass(fields: dict[str, Any], permissive: bool) -> None:
    assert packages.is_permissive(licensed(**fields)) is permissive


def test_packages_found_here_are_permissive_and_their_own() -> None:
    found = packages.permissive_sources()
    assert any(name.startswith("transformers ") for name in found)
    assert not any("_vendor" in path.parts for files in found.values() for path in files)
