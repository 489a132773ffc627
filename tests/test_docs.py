"""Documentation tests: links and anchors, cited sections and decisions, named files, the format of decisions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DECISIONS = sorted(ROOT.glob("docs/decisions/[0-9]*.md"))
SOURCES = sorted(
    path
    for folder in ("headwise", "tests", "benchmarks", "docs")
    for kind in ("py", "yaml", "md")
    for path in ROOT.glob(f"{folder}/**/*.{kind}")
    if path != Path(__file__)
)
# Pages that describe the code: every file that they name exists.
DESCRIPTIONS = [ROOT / "docs/architecture.md", ROOT / "docs/mathematics.md", *DECISIONS]
PARTS = ["Context", "Decision", "Consequences", "Measured"]

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
SECTION = r"\d+[a-z]?\b"
# "mathematics, section 4c", "mathematics, sections 1 to 3", "mathematics section 2"; a line may end anywhere.
CITATION = re.compile(
    rf"\bmathematics\b,?[\s#]+sections?[\s#]+({SECTION}(?:(?:,|[\s#]+and|[\s#]+to)[\s#]+{SECTION})*)", re.IGNORECASE
)
DECISION = re.compile(r"\bdecisions?(?:[\s#]+|/)(\d{3,4})\b", re.IGNORECASE)
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|yaml|md|toml)|/)")


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: Counter[str] = Counter()
    names = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", prose(page)))
    for heading in HEADING.findall(prose(page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def broken_links(page: Path) -> Iterator[str]:
    """Yield every link of a page that leads to no file or to no heading; web addresses are not followed."""
    for target in filter(None, (a or b for a, b in LINK.findall(CODE.sub("", prose(page))))):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            yield f"{target}: the page has no such heading"


def cited_sections(text: str) -> set[str]:
    """Return the sections of the mathematics that a text cites; "1 to 3" cites 1, 2 and 3."""
    cited = set()
    for sections in CITATION.findall(text):
        cited |= set(re.findall(SECTION, sections))
        for first, last in re.findall(r"(\d+)[\s#]+to[\s#]+(\d+)", sections):
            cited |= set(map(str, range(int(first), int(last) + 1)))
    return cited


def missing_files(page: Path) -> Iterator[str]:
    """Yield every file or folder that a page names in code style and that does not exist.

    Names are relative to the repository or to the package; a bare name may be in any folder.
    """
    for name in sorted(set(CODE.findall(prose(page)))):
        if not FILE.fullmatch(name):
            continue
        places = [ROOT / name, ROOT / "headwise" / name]
        if "/" not in name.rstrip("/"):
            places += [*(ROOT / "headwise").rglob(name.rstrip("/")), *(ROOT / "tests").rglob(name.rstrip("/"))]
        if not any(place.exists() for place in places):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert not list(broken_links(page))


def test_wrong_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One `two`, three\n\n## Same\n\n## Same\n")
    page.write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](other.md#same-1) [d](https://example.org/none#x)\n"
        "`[code](none.md)`\n```\n[code](none.md)\n```\n"
        "[e](none.md) [f](other.md#two) [g](#here) ![h](none.png) [i](other.md#same-2)\n"
    )
    found = [link.partition(":")[0] for link in broken_links(page)]
    assert found == ["none.md", "other.md#two", "#here", "none.png", "other.md#same-2"]


def test_cited_sections_of_the_mathematics_exist() -> None:
    headings = HEADING.findall((ROOT / "docs/mathematics.md").read_text(encoding="utf-8"))
    sections = {match[1] for heading in headings if (match := re.match(r"(\d+[a-z]?)\. ", heading))}
    cited = {path: cited_sections(path.read_text(encoding="utf-8")) for path in SOURCES}
    every = set().union(*cited.values())
    assert {"0", "1", "2", "3", "4", "4a", "4b", "4c", "5"} <= every, "citations are not read"
    assert not {
        str(path.relative_to(ROOT)): sorted(names - sections) for path, names in cited.items() if names - sections
    }


def test_citations_are_read_in_every_form() -> None:
    assert cited_sections("(mathematics, section 4c)") == {"4c"}
    assert cited_sections("mathematics section 2; Mathematics, sections 4a and\n    4b") == {"2", "4a", "4b"}
    assert cited_sections("# the mathematics,\n# sections 1 to 3, and section 9") == {"1", "2", "3"}
    assert not cited_sections("mathematics, torch and layout")


def test_cited_decisions_exist() -> None:
    numbers = {path.name[:4] for path in DECISIONS}
    wrong = {}
    for path in SOURCES:
        cited = set(DECISION.findall(path.read_text(encoding="utf-8")))
        if cited - numbers:
            wrong[str(path.relative_to(ROOT))] = sorted(cited - numbers)
    assert not wrong


def test_named_decision_pages_exist() -> None:
    named = {
        name
        for path in SOURCES
        for name in re.findall(r"decisions/(\d[\w-]+\.md)", path.read_text(encoding="utf-8"))
    }
    assert named and named <= {path.name for path in DECISIONS}


@pytest.mark.parametrize("page", DESCRIPTIONS, ids=lambda page: page.stem)
def test_named_files_exist(page: Path) -> None:
    assert not list(missing_files(page))


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_decisions_have_one_format(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    number = re.match(r"(\d{4})-[a-z0-9-]+\.md$", page.name)
    assert number, "a decision is named NNNN-subject.md"
    head = re.match(r"# (\d{4})\. \S.*\n\n- Date: \d{4}-\d{2}-\d{2}\n- Status: (accepted|replaced)\b", text)
    assert head and head[1] == number[1], "title, date and status come first"
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    assert parts[::2] == PARTS
    assert all(part.strip() for part in parts[1::2]), "every part has text"


def test_decisions_are_numbered_without_gaps_and_indexed() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d{4})\]\((\S+)\) \| (.+) \| (\S+) \|$", index, flags=re.MULTILINE)
    expected = []
    for page in DECISIONS:
        title, _, date = page.read_text(encoding="utf-8").split("\n")[:3]
        expected.append((page.name[:4], page.name, title[len("# 0000. ") :], date.removeprefix("- Date: ")))
    assert rows == expected
