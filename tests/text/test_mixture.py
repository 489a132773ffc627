"""The built-in mixture: English and code, with a part that no other split shares."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

from headwise.text.builtin import repeats_heldout
from headwise.text.mixture import CODE_SHARE, ENGLISH, mixture_documents


def test_english_and_code_are_in_their_shares() -> None:
    texts, prose = mixture_documents("calibration"), mixture_documents("prose")
    code = [text for text in texts if text not in set(prose)]
    characters = sum(map(len, texts))
    assert abs(sum(map(len, code)) / characters - CODE_SHARE) < 0.05
    assert any("def " in text for text in code) and not any(repeats_heldout(text) for text in code)
    assert mixture_documents("calibration") == texts


def test_the_heldout_part_is_in_no_other_split() -> None:
    held = set(mixture_documents("heldout"))
    assert len(held) > 20
    assert not held & set(mixture_documents("train")) and not held & set(mixture_documents("prose"))


def test_every_source_has_a_licence() -> None:
    note = (Path(ENGLISH).parent / "LICENSES.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lzma.decompress(ENGLISH.read_bytes()).splitlines()]
    assert all(f"| `{row['source']}` |" in note for row in rows)
    assert ENGLISH.stat().st_size < 400_000
