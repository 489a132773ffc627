"""Rebuild headwise/text/english.jsonl.xz, the English part of the built-in mixture.

    apt-get download jargon-text=4.4.7-4.1 r-cran-janeaustenr=1.0.0-1
    pip download --no-deps --no-binary :all: brotli==1.1.0
    python benchmarks/english_text.py FOLDER

FOLDER holds the three archives. The same archives give the same bytes. headwise/text/LICENSES.md has the licences.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

ARCHIVES = {
    "jargon-text_4.4.7-4.1_all.deb": "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
    "r-cran-janeaustenr_1.0.0-1_all.deb": "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "Brotli-1.1.0.tar.gz": "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724",
}
OUT = Path(__file__).parents[1] / "headwise" / "text" / "english.jsonl.xz"
OWN = Path(__file__).with_name("conversations.txt")
PIECE = 4000  # characters of a document, about
# Source to its share of characters; every source is cut into pieces, and pieces are taken evenly from all of it.
CHARACTERS = {"workshop": 250_000, "jargon": 280_000, "austen": 220_000, "alice": 75_000, "play": 75_000}


def paragraphs(text: str) -> list[str]:
    """Return paragraphs with each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def pieces(parts: list[str]) -> list[str]:
    """Return neighbouring paragraphs joined to documents of about PIECE characters."""
    documents, document = [], ""
    for part in parts:
        document += part + "\n\n"
        if len(document) >= PIECE:
            documents.append(document.strip())
            document = ""
    return documents


def evenly(documents: list[str], characters: int) -> list[str]:
    """Return documents spread evenly over a list, of that many characters in all, about."""
    step = max(1.0, sum(map(len, documents)) / characters)
    return [documents[int(i * step)] for i in range(int(len(documents) / step))]


def workshop(text: str) -> list[str]:
    """Return the proceedings without the table of contents, the directory of speakers and short lines."""
    body = text[text.index("INTRODUCTION\n") : text.index("Appendix I:  PROGRAM")]
    return [part for part in paragraphs(body) if len(part) > 200]


def jargon(text: str) -> list[str]:
    """Return entries with at least one paragraph of 300 characters; braces of cross references are left out."""
    entries = re.split(r"\n   :(?=[^\n]+:)", text[text.index("\n   :/dev/null:") :])
    kept = []
    for entry in entries:
        head, _, body = entry.partition("\n\n")
        prose = paragraphs(re.sub(r"[{}]", "", body))
        if any(len(part) > 300 for part in prose):
            kept.append(f"{head.partition(':')[0].strip()}\n" + "\n".join(prose))
    return kept


def play(text: str) -> list[str]:
    """Return speeches, one paragraph each: the name, then the words."""
    body = text[text.index("ACT I") :]
    speeches = re.findall(r"^([A-Z][A-Z ]+)\t(.*(?:\n\t.*)*)", body, re.MULTILINE)
    return [f"{name}: {' '.join(words.split())}" for name, words in speeches]


def novels(database: bytes) -> Iterator[list[str]]:
    """Yield the paragraphs of each novel in an R lazy-load database of character vectors."""
    start = 0
    while start < len(database):
        stream = zlib.decompressobj()
        raw = stream.decompress(database[start + 4 :])
        start = len(database) - len(stream.unused_data)
        position, lines = raw.index(b"\x00\x04\x00\x09"), []
        while raw[position : position + 4] == b"\x00\x04\x00\x09":
            (length,) = struct.unpack(">i", raw[position + 4 : position + 8])
            lines.append(raw[position + 8 : position + 8 + max(length, 0)].decode("ascii"))
            position += 8 + max(length, 0)
        yield [part for part in paragraphs("\n".join(lines)) if len(part) > 20]


def read(folder: Path) -> dict[str, list[str]]:
    """Return every source's documents."""
    for name, digest in ARCHIVES.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{folder / name} is not the archive that the text was made from.")
    with tempfile.TemporaryDirectory() as scratch:
        for name in ARCHIVES:
            if name.endswith(".deb"):
                subprocess.run(["dpkg", "-x", folder / name, scratch], check=True)
        packed = Path(scratch, "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()
        database = Path(scratch, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    canterbury = {}
    with tarfile.open(folder / "Brotli-1.1.0.tar.gz") as archive:
        for name in ("alice29", "asyoulik", "lcet10"):
            file = archive.extractfile(f"Brotli-1.1.0/tests/testdata/{name}.txt")
            assert file is not None
            canterbury[name] = file.read().decode("latin-1").replace("\r\n", "\n")
    return {
        "workshop": pieces(workshop(canterbury["lcet10"])),
        "jargon": pieces(jargon(zlib.decompress(packed, 31).decode())),
        "austen": [piece for novel in novels(database) for piece in pieces(novel)],
        "alice": pieces(paragraphs(canterbury["alice29"].partition("CHAPTER I\n")[2].rpartition("THE END")[0])),
        "play": pieces(play(canterbury["asyoulik"])),
    }


def main() -> None:
    """Write the file and print the size of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    chosen = {name: evenly(found, CHARACTERS[name]) for name, found in read(parser.parse_args().folder).items()}
    chosen["conversations"] = [text.strip() for text in OWN.read_text(encoding="utf-8").split("\n---\n")]
    rows = [{"source": name, "text": text} for name, texts in chosen.items() for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    OUT.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    for name, texts in chosen.items():
        print(f"{name}: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
