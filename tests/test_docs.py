"""Documentation tests: links and anchors, cited sections and decisions, named files, the format of decisions."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from headwise._cli.app import check_options
from headwise.cli import cli
from headwise.convert.calibration.sample_settings import SampleSettings
from headwise.convert.settings import ConvertSettings
from headwise.convert.verify.settings import VerifySettings
from headwise.demo.settings import DemoSettings
from headwise.errors import HeadwiseError
from headwise.eval.bench_settings import BenchSettings
from headwise.eval.settings import EvalSettings
from headwise.recipes.settings import UptrainSettings
from headwise.records import push
from headwise.records.push import HubRepository
from headwise.serving.settings import ServingSettings
from tests.convert.speaking import save_speaking

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

# Pages with commands and code for users.
GUIDE = [
    ROOT / "README.md",
    ROOT / "docs/index.md",
    ROOT / "docs/results/serving.md",
    *sorted(ROOT.glob("docs/guide/*.md")),
]
SETTINGS = {
    "convert": ConvertSettings,
    "inspect": ServingSettings,
    "verify": VerifySettings,
    "sample": SampleSettings,
    "bench": BenchSettings,
    "demo": DemoSettings,
    "uptrain": UptrainSettings,
    "eval": EvalSettings,
}

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


def commands(page: Path) -> list[str]:
    """Return the headwise commands in the code blocks of a page, and in its text those with their arguments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [match[0] for match in FENCE.finditer(text)]
    blocks += [line for line in FENCE.sub("", text).splitlines() if line.startswith("    ")]
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    inline = [code for code in CODE.findall(prose(page)) if re.match(r"headwise [a-z]+ [A-Z]", code)]
    lines += [code for code in inline if not {"...", "N", "FILE"} & set(code.split())]
    launched = [line.partition("-m headwise")[2] for line in lines if "-m headwise " in line]
    own = [line.removeprefix("headwise") for line in lines if re.match(r"headwise [a-z]", line)]
    return [command.strip() for command in (*own, *launched)]


def check_command(command: str) -> None:
    """Parse a command as the command line does, and make its settings object."""
    words = shlex.split(command.partition(" > ")[0], comments=True)
    verb: Any = cli
    names = []
    while isinstance(verb, click.Group):
        names.append(words.pop(0))
        verb = verb.commands[names[-1]]
    context = verb.make_context(names[-1], words)
    given = {name: value for name, value in context.params.items() if value is not None and value != ()}
    if names[-1] in SETTINGS:
        check_options(SETTINGS[names[-1]], given)


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_the_commands_of_the_guide_are_legal(page: Path) -> None:
    wrong = []
    for command in commands(page):
        try:
            check_command(command)
        except (click.ClickException, click.exceptions.Exit, HeadwiseError, KeyError) as error:
            wrong.append(f"{command}: {error if str(error) else type(error).__name__}")
    assert not wrong


def test_wrong_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\n$ headwise convert A B --to gqa \\\n    --groups 0\n```\n`headwise evl A`\n    headwise eval A -x\n"
    )
    found = commands(page)
    assert found == ["convert A B --to gqa      --groups 0", "eval A -x", "evl A"]
    for command in found:
        with pytest.raises((click.ClickException, HeadwiseError, KeyError)):
            check_command(command)


def code_blocks(page: Path) -> list[str]:
    """Return the Python code of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code runs on a tiny model in place of the embedded one, and without the Hub."""
    pytest.importorskip("lm_eval")
    save_speaking(tmp_path / "headwise/demo/model", max_position_embeddings=256)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    free = HubRepository("org/name", None, exists=False, private=True, new_branch=False, files=())
    monkeypatch.setattr(push, "check_repository", lambda *_, **__: free)
    monkeypatch.setattr("headwise.convert.forecast.amounts.STEPS_TO_TRY", (2,))
    blocks = code_blocks(ROOT / "docs/guide/python.md")
    assert len(blocks) >= 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)
    assert names["result"].verification.passed and names["evaluation"].parent is not None


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_python_code_compiles_and_its_imports_exist(page: Path) -> None:
    for block in code_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert not [name.name for name in node.names if not hasattr(module, name.name)]


def test_the_messages_of_troubleshooting_exist() -> None:
    page = (ROOT / "docs/guide/troubleshooting.md").read_text(encoding="utf-8")
    sources = "".join(
        # Strings that Python joins are joined.
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for kind in ("py", "yaml")
        for path in ROOT.glob(f"headwise/**/*.{kind}")
    )
    tables = re.findall(r"^\| message contains .*?\n\n", page + "\n\n", re.MULTILINE | re.DOTALL)
    rows = [line for table in tables for line in table.splitlines()[2:] if line]
    messages = [code for row in rows for code in CODE.findall(row.split("|")[1])]
    assert len(messages) > 15
    assert not [message for message in messages if message not in sources]


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
