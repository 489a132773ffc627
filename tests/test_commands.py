"""The commands of the README and of the guide run, on a tiny model and with small budgets.

A command runs as it stands, in a folder that has what it names: MODEL, OUT, corpus/ and so on. `SMALL` adds budgets
that a tiny model needs; `NOT_RUN` names the commands that cannot run here, with the reason.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner

from headwise.cli import cli
from headwise.io.source import EMBEDDED_MODEL
from tests.convert.speaking import save_speaking
from tests.io.gguf_files import Kind, write_gguf
from tests.test_docs import GUIDE, ROOT, commands

pytest.importorskip("lm_eval")

# A word or words of a command, and why no such command runs.
NOT_RUN = {
    "--launch": "starts several processes",
    "--device cuda": "needs a GPU",
    "hf:org/name": "downloads a data set",
    "push ": "uploads to the Hub",
    "--recipe standard": "downloads questions",
    "--tasks hellaswag": "downloads questions",
    "--memory 24GB": "fills 24 GB of memory",
    "--eval-result": "needs a benchmark of the Hub in the report",
    "data.length=131072": "reads documents of 131,072 tokens",
    "--part": "needs an encoder-decoder; tests/convert/test_choose.py has one",
    "verify WORK": "needs the work folder of a failed conversion",
}
# A small value in place of one that a command gives, by the flag or the setting.
SMALL = {
    "--tokens": "4K",
    "train.pretraining_tokens": "400K",
    "--limit": "2",
    "--calibration-tokens": "2048",
    "--batch": "2",
    "--sliding-window": "512",
    "--index-topk": "128",
}
# Budgets that are added to each command of a verb where they have an effect.
MORE = {
    "convert": "--calibration-tokens 2048 --refit off",
    "eval": "--limit 2 --recipe small.yaml",
    "uptrain": "--set data.length=64 --set train.batch_tokens=512 --set train.micro_batch_tokens=512",
    "bench": "--steps 2",
}
RECIPE = """
about: A little of everything.
tasks: [headwise_cloze_code]
perplexity: {length: 64, blocks: 8, stretches: 4}
"""
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
# 16 KV heads and a wide model: every target that the pages name is legal.
SHAPE = {
    "hidden_size": 256,
    "num_attention_heads": 64,
    "num_key_value_heads": 16,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}


def small(command: str) -> list[str]:
    """Return the words of a command with small budgets."""
    words = shlex.split(command.partition(" > ")[0], comments=True)
    for place, word in enumerate(words):
        if word in SMALL:
            words[place + 1] = SMALL[word]
        elif (name := word.partition("=")[0]) in SMALL:
            words[place] = f"{name}={SMALL[name]}"
    lossy = {"gqa", "mqa", "mla"} & {*words} and "--exact" not in words and words[-1] != "64"
    if words[0] != "convert" or (lossy and "--calibrate" not in words):
        more = shlex.split(MORE.get(words[0], ""))
        if words[0] == "uptrain" and "two-stage" in words:
            more += ["--set", "layerwise.tokens=512", "--set", "layerwise.steps=2"]
        for flag, value in zip(more[::2], more[1::2], strict=True):
            words += [flag, value] if flag == "--set" or flag not in words else []
    return words


def why_not(command: str) -> str | None:
    """Return why a command does not run here; None if it runs."""
    return next((reason for words, reason in NOT_RUN.items() if words in command), None)


def unique(pages: list[Path]) -> Iterator[str]:
    """Yield every command of the pages once, in order."""
    yield from dict.fromkeys(" ".join(command.split()) for page in pages for command in commands(page))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name but do not make."""
    home = tmp_path_factory.mktemp("world")
    save_speaking(home / "MODEL", torch.bfloat16, **SHAPE)
    shutil.copytree(EMBEDDED_MODEL, home / "headwise/demo/model")
    texts = [{"text": path.read_text(encoding="utf-8")[:20_000]} for path in sorted(ROOT.glob("headwise/*.py"))]
    (home / "corpus").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), home / "corpus/a.parquet")
    for name in ("corpus/a.jsonl", "train.jsonl", "held.jsonl", "text.jsonl"):
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    (home / "MODEL/chat_template.jinja").write_text(TEMPLATE)
    chat = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2, I think."}]
    for name in ("chats.jsonl", "held-chats.jsonl"):
        (home / name).write_text((json.dumps({"messages": chat}) + "\n") * 800)
    (home / "questions").mkdir()
    question = {"goal": "Cut wood", "sol1": "Use a saw.", "sol2": "Use soap.", "label": 0}
    (home / "questions/piqa.jsonl").write_text((json.dumps(question) + "\n") * 3)
    (home / "small.yaml").write_text(RECIPE)
    write_gguf(home / "model-Q4_K_M.gguf", "llama", Kind.Q8_0)
    return home


def run(words: list[str]) -> str:
    """Run a command in the working folder; return what went wrong."""
    result: Any = CliRunner().invoke(cli, words)
    if result.exit_code == 0:
        return ""
    return f"{shlex.join(words)}: exit code {result.exit_code}: {result.stderr[-300:]} {result.exception!r}"


def test_the_commands_of_the_readme_run_one_after_the_other(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "here"))
    config = json.loads(Path("MODEL/config.json").read_text())  # a shorter context is faster
    Path("MODEL/config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    for command in unique([ROOT / "README.md"]):
        if reason := why_not(command):
            print(f"not run: headwise {command}: {reason}")
            continue
        problem = run(small(command))
        assert not problem, problem
    assert Path("RECOVERED/README.md").read_text(encoding="utf-8").count("held-out perplexity")


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in GUIDE if page.name != "README.md"], ids=lambda page: page.stem)
def test_the_commands_of_the_guide_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: Path
) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    problems = []
    for number, command in enumerate(unique([page])):
        if reason := why_not(command):
            print(f"not run: headwise {command}: {reason}")
            continue
        monkeypatch.chdir(shutil.copytree(world, tmp_path / str(number)))
        if command.startswith("sample"):
            Path("text.jsonl").unlink()
        problems += [problem for words in (*before(command), small(command)) if (problem := run(words))]
    assert not problems


def before(command: str) -> Iterator[list[str]]:
    """Yield the commands that make what a command needs."""
    words = shlex.split(command)
    if words[0] in ("eval", "uptrain", "verify", "bench", "card") or words[:2] == ["inspect", "OUT"]:
        made = next(word for word in words[1:] if word.isupper())
        parent = words[words.index("--against") + 1] if "--against" in words else "MODEL"
        yield ["convert", parent, made, "--to", "mqa", "--calibrate", "none", "--refit", "off"]
    if words[:2] == ["convert", "OUT"] and "--index-layers" in words:
        yield small("convert MODEL OUT --sparse dsa --to mla --cache 25% --index-topk 128")
    if words[0] == "card":
        yield small(f"eval {made} --baseline MODEL --report {words[2]}")


def test_a_command_that_cannot_run_is_named_once() -> None:
    every = list(unique(GUIDE))
    assert not [words for words in NOT_RUN if not any(words in command for command in every)]
    assert len([command for command in every if why_not(command) is None]) > 25
