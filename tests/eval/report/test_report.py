"""The report: the verdict comes first, it is complete, and a browser shows it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
from PIL import Image

from headwise.errors import HeadwiseError
from headwise.eval.report.report import read_report, render_markdown, render_page, write_report
from headwise.eval.result import Continuation
from headwise.eval.verdict import verdict_of
from tests.browser import browse, find_browser
from tests.eval import evaluations
from tests.eval.evaluations import full


@pytest.mark.parametrize(
    "evaluation",
    [
        full(),
        replace(full(), fail_above=0.01),
        evaluations.broken(),
        evaluations.unharmed(),
        evaluations.identical(),
        evaluations.alone(),
        evaluations.only(),
        evaluations.only(evaluations.equal_answers()),
    ],
)
def test_the_verdict_comes_first(evaluation):
    verdict = verdict_of(evaluation)
    for text in (render_markdown(evaluation), render_page(evaluation)):
        words = unescape(re.sub(r"<[^>]+>|\*\*|`", "", text))
        places = [words.find(word) for word in ("Quality loss", "KV cache per token") if word in words]
        assert -1 < words.find(verdict.text.replace("`", "")) < min(places)


@pytest.mark.parametrize("name", ["full", "unharmed", "identical", "alone"])
def test_a_report_is_read_back_and_refers_to_nothing_that_is_missing(tmp_path, name):
    evaluation = getattr(evaluations, name)()
    written = write_report(evaluation, tmp_path / "report")
    assert read_report(tmp_path / "report") == written
    assert replace(written, figures={}) == evaluation
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["summary"] == list(evaluation.summary) and data["passed"] == evaluation.passed
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures == set(written.figures.values())
    assert {path.stem for path in (tmp_path / "report").glob("*.svg")} == set(written.figures)
    text = (tmp_path / "report" / "report.md").read_text()
    assert set(re.findall(r"\]\(([^)]+)\)", text)) == pictures
    assert (
        len({line.count("|") for line in text.splitlines() if line.startswith("| figure") or "samples |" in line})
        < 2
    )


def test_a_table_has_every_figure():
    text = render_markdown(full())
    row = next(line for line in text.splitlines() if line.startswith("| arc_easy | acc"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [
        "acc_norm, 1,000 samples",
        "43.1%",
        "40.2%",
        "**−2.9**",
        "−4.0 to −1.8",
        "+40 −69",
        "< 0.001",
        "< 0.001",
    ]
    assert "| held-out perplexity | perplexity, 128 samples | 5.920 | 6.106 | **+3.1%** | +2.7 to +3.6 |" in text
    assert "exact_match (strict-match), 5-shot" in text and "| same next token | 91.23% |" in text
    assert full().command in text and "layer 1 head 7" in text


def test_the_loss_at_the_last_positions_needs_the_whole_context():
    evaluation = full()
    assert "last positions" not in render_markdown(evaluation)
    whole = replace(evaluation, positions=replace(evaluation.positions, trained=1024))
    ours, theirs = whole.positions.child.nats[-1], whole.positions.parent.nats[-1]
    row = (
        f"| loss at the last positions | {ours:.3f} | nats per token from 960 to 1,024; the parent's {theirs:.3f} |"
    )
    assert row in render_markdown(whole)


class Tags(HTMLParser):
    """Every tag of a page, and whether they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "br", "wbr", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_complete_and_loads_nothing():
    page = Tags(render_page(full()))
    assert not page.open and len(page.ids) == len(set(page.ids))
    references = [
        value
        for tag, attributes in page.found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    assert all(value.startswith(("#", "data:image/png;base64")) for value in references)
    assert {tag for tag, _ in page.found} & {"script", "link", "iframe", "object", "form"} == set()
    text = render_page(full())
    assert "@import" not in text and "url(http" not in text
    inside = {value[1:] for value in references if value.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", text)
    )
    assert inside <= set(page.ids)


def test_generated_text_stays_text():
    evil = "<script>alert(1)</script>\x1b[31m\u202e & `code` | cell"
    base = full()
    generation = replace(base.generation, samples=(Continuation(evil, evil, evil),), complaints=(evil,))
    child = replace(base.child, model=evil, attention=evil)
    evaluation = replace(base, generation=generation, child=child, command=evil, settings={evil: evil})
    text = render_page(evaluation)
    assert "<script" not in text and "\x1b" not in text and "\x1b" not in render_markdown(evaluation)
    Tags(text)
    setting = next(line for line in render_markdown(evaluation).splitlines() if line.startswith("| <script"))
    assert len(re.findall(r"(?<!\\)\|", setting)) == 3, "a bar in a cell would end it"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no report"),
        ("[", "is not valid JSON"),
        ("[]", "a JSON object is expected"),
        ('{"child": 3}', "is not a"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(HeadwiseError, match=words):
        read_report(tmp_path)


def test_a_report_is_not_overwritten(tmp_path):
    write_report(evaluations.alone(), tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(HeadwiseError, match="holds a report already"):
        write_report(full(), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


BROWSER = find_browser()


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: install one, or name it in CHROMIUM")
def test_the_page_in_a_browser(tmp_path):
    write_report(full(), tmp_path / "report")
    file = tmp_path / "report" / "report.html"
    with browse(BROWSER, tmp_path / "profile") as shown:
        pictures = {}
        for name, width, dark in (("light", 1100, False), ("dark", 1100, True), ("phone", 360, False)):
            shown.open(file, width=width, dark=dark)
            assert shown.ask("document.documentElement.scrollWidth") <= width, f"{name}: wider than the screen"
            cut = (
                "[...document.querySelectorAll('td, dd, p')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
            )
            assert shown.ask(cut) == 0, f"{name}: text runs out of its place"
            small = (
                "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
            )
            assert shown.ask(small) >= 10, f"{name}: words of a figure are too small to read"
            pictures[name] = Image.open(shown.picture(tmp_path / f"{name}.png")).convert("RGB")
        assert not shown.complaints
        assert all(address.startswith(("file:", "data:")) for address in shown.asked)
    assert pictures["light"].getpixel((2, 2)) == (255, 255, 255)
    assert max(pictures["dark"].getpixel((2, 2))) < 40
    # Nothing is left in the colours of the other scheme: in the dark no large part of the page is white.
    for name, brightest in (("dark", 0.1), ("light", 0.99)):
        levels = pictures[name].convert("L").histogram()
        assert sum(levels[250:]) / sum(levels) < brightest
