"""Attacks on files that headwise writes and reads again: record, generation config, report, card, work folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from headwise._cli import render
from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from headwise.eval.model import content_hash
from headwise.eval.report.card_section import update_card
from headwise.format import plain
from headwise.io.source import source_in_folder
from headwise.io.workdir import Interrupted, WorkFolder
from headwise.records.card import inherited
from tests.eval.evaluations import full
from tests.hostile.guard import Outcome
from tests.hostile.mutations import dumps, flip, garble, tree

GQA: dict[str, Any] = {"to": "gqa", "groups": 2, "calibrate": "none"}
GENERATION = ["temperature", "num_beams", "stop_strings", "max_length", "do_sample", "use_cache", "top_k"]
REPORT = ["logs", "command", "child", "parent", "comparisons", "settings", "versions", "figures", "generation"]


def _lay(prey: Any, **changed: bytes) -> Path:
    """Copy the converted folder, with some files replaced."""
    folder: Path = prey.lay("config.json", **{**prey.converted, **changed})
    return folder


def record(prey: Any, random: Random) -> Outcome:
    """headwise.json of a converted folder, given to `verify` and `inspect`."""
    folder = _lay_record(prey, random)

    def call() -> Any:
        inspect_model(folder)
        return verify_model(folder)

    outcome: Outcome = prey.judge(call, render.render_verification)
    return outcome


def record_read(prey: Any, random: Random) -> Outcome:
    """The same record, given to `verify --hashes`, which loads no model."""
    folder = _lay_record(prey, random)
    outcome: Outcome = prey.judge(lambda: verify_model(folder, hashes=True), render.render_verification)
    return outcome


def _lay_record(prey: Any, random: Random) -> Path:
    content = prey.converted["headwise.json"]
    if random.random() < 0.2:
        changed = garble(random, content.decode()).encode(errors="surrogatepass")
    else:
        changed = dumps(tree(random, json.loads(content), ["arguments", "sha256", "files", "layers"])).encode()
    return _lay(prey, **{"headwise.json": changed})


def generation(prey: Any, random: Random) -> Outcome:
    """generation_config.json of a converted folder, given to `verify`."""
    changed = tree(random, json.loads(prey.converted["generation_config.json"]), GENERATION)
    folder = _lay(prey, **{"generation_config.json": dumps(changed).encode()})
    outcome: Outcome = prey.judge(lambda: verify_model(folder), render.render_verification)
    return outcome


@cache
def _report(home: Path) -> dict[str, Any]:
    folder = home / "converted"
    child = replace(full().child, sha256=content_hash(source_in_folder(str(folder), folder)))
    report: dict[str, Any] = plain(replace(full(), child=child, logs={"child": "child"}))
    return report


def _update(prey: Any, report: bytes, card: bytes, logs: bytes = b'{"configs": {"gsm8k": {}}}') -> Outcome:
    """Update the card of a folder; a refusal leaves the folder unchanged."""
    shutil.copytree(prey.home / "converted", prey.out)
    (prey.out / "README.md").write_bytes(card)
    folder = prey.out.parent / "report"
    (folder / "child").mkdir(parents=True)
    (folder / "report.json").write_bytes(report)
    (folder / "child" / "results_1.json").write_bytes(logs)
    before = _content(prey.out)

    def call() -> Any:
        inherited(prey.out / "README.md")
        return update_card(prey.out, folder)

    outcome = prey.guard.watch(call)
    after, escapes = _content(prey.out), list(outcome.escapes)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if changed - ({"README.md"} if outcome.kind == "done" else set()):
        escapes.append(f"changed: {sorted(changed)}")
    return _finish(prey, outcome, escapes)


def report(prey: Any, random: Random) -> Outcome:
    """report.json and lm-eval's result file, given to `card`."""
    original = _report(prey.home)
    changed = tree(random, original, REPORT)
    if isinstance(changed, dict) and isinstance(changed.get("child"), dict) and random.random() < 0.9:
        changed["child"]["sha256"] = original["child"]["sha256"]
    text, logs = (
        dumps(changed),
        dumps(tree(random, {"configs": {"gsm8k": {"dataset_path": "a", "test_split": "b"}}})),
    )
    if random.random() < 0.1:
        text = garble(random, text)
    card = prey.converted["README.md"]
    return _update(prey, text.encode(errors="surrogatepass"), card, logs.encode())


def card(prey: Any, random: Random) -> Outcome:
    """README.md of a converted folder, given to `card` and read as the card of a source."""
    text = prey.converted["README.md"].decode()
    end = text.index("\n---\n", 4)
    front, body = text[4:end], text[end:]
    what = random.randrange(4)
    if what == 0:
        front = garble(random, front)
    elif what == 1:
        names = ["model-index", "eval_results", "license", "model_name", "tags", "self", "metrics"]
        front = "\n".join(f"{random.choice(names)}: {dumps(tree(random, {'a': [1, {'b': 2}]}))}" for _ in range(3))
    elif what == 2:
        odd = ["1" + ":59" * 3000, "[" * 3000, "{a: " * 500, "&a [*a]", "!!python/name:os.system", "2001-99-99"]
        front += f"\n{random.choice(['x', 'license', 'model-index', '<<'])}: {random.choice(odd)}"
    else:
        body = garble(random, body)
    content = f"---\n{front}{body}".encode(errors="surrogatepass")
    content = flip(random, content) if random.random() < 0.2 else content
    return _update(prey, json.dumps(_report(prey.home)).encode(), content)


@cache
def _unfinished(home: Path) -> dict[str, bytes]:
    """Return the files of the work folder of a conversion that was interrupted before it was published."""
    out = home / "interrupted"
    with mock.patch.object(WorkFolder, "publish", side_effect=KeyboardInterrupt), suppress(Interrupted):
        convert_model(home / "micro", out, **GQA)
    return _content(home / ".interrupted.headwise-work")


def work_folder(prey: Any, random: Random) -> Outcome:
    """The work folder of an interrupted conversion, which is resumed or begun again."""
    files = dict(_unfinished(prey.home))
    lines = files["journal.jsonl"].splitlines(keepends=True)
    lines = lines[: random.choice([len(lines), random.randrange(len(lines) + 1)])]
    what = random.randrange(5)
    if what == 0 and lines:
        place = random.randrange(len(lines))
        lines[place] = dumps(tree(random, json.loads(lines[place]))).encode() + b"\n"
    elif what == 1:
        random.shuffle(lines)
    files["journal.jsonl"] = b"".join(lines)
    if what == 2:
        files["journal.jsonl"] = flip(random, files["journal.jsonl"] or b"{}\n")
    elif what == 3:
        files["owner"] = random.choice([b"\xff\xfe", b"process 1 on elsewhere", b"", b"\x1b[2J", b"x" * 5000])
    name = random.choice(list(files))
    folder = prey.out.parent / f".{prey.out.name}.headwise-work"
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    if what == 4:
        _odd_entry(folder / name, random, prey)
    resume = random.random() < 0.8
    outcome = prey.guard.watch(
        lambda: convert_model(prey.home / "micro", prey.out, **GQA, resume=resume, force=not resume)
    )
    escapes = list(outcome.escapes)
    weights = prey.out / "model.safetensors"
    if outcome.kind == "done" and weights.read_bytes() != prey.converted["model.safetensors"]:
        escapes.append("other weights than those of the conversion")
    if outcome.kind != "done" and prey.out.exists():
        escapes.append("OUT is there after a failure")
    return _finish(prey, outcome, escapes)


def _odd_entry(path: Path, random: Random, prey: Any) -> None:
    content = path.read_bytes()
    path.unlink()
    makers: list[Callable[[], Any]] = [
        path.mkdir,
        lambda: path.symlink_to(prey.home / "micro" / "config.json"),
        lambda: os.mkfifo(path),
        lambda: path.write_bytes(content[: len(content) // 2]),
        lambda: None,
    ]
    random.choice(makers)()


def _finish(prey: Any, outcome: Outcome, escapes: list[str]) -> Outcome:
    """Look for code that ran, and empty the folder of the outputs."""
    if prey.canary.exists():
        escapes.append("code from the checkpoint ran")
        prey.canary.unlink()
    for path in list(prey.out.parent.iterdir()):
        shutil.rmtree(path, ignore_errors=True)
    return replace(outcome, escapes=tuple(escapes))


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
