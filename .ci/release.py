"""Check a release: the tag, the version of the package and the changelog agree. Write the notes to build/notes.md.

python .ci/release.py v1.2.3
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes_of(changelog: str, release: str) -> str:
    """Return the text of a release's section in a changelog in the form of Keep a Changelog.

    Args:
        changelog: the text of CHANGELOG.md.
        release: a version, such as 1.2.3.

    Raises:
        ValueError: there is no dated section of that version, or it is empty.
    """
    heading = rf"^## \[{re.escape(release)}\] - \d{{4}}-\d\d-\d\d$"
    found = re.search(rf"{heading}\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise ValueError(f"CHANGELOG.md has no section '## [{release}] - YYYY-MM-DD' with text")
    return found[1].strip() + "\n"


def main(tag: str) -> int:
    """Check one tag; return the exit code."""
    installed = version("headwise")
    if tag != f"v{installed}":
        print(f"The tag {tag!r} is not the version of the package: v{installed}.", file=sys.stderr)
        return 1
    try:
        notes = notes_of((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), installed)
    except ValueError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "notes.md").write_text(notes, encoding="utf-8")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Give one tag, for example: python .ci/release.py v1.2.3")
    sys.exit(main(sys.argv[1]))
