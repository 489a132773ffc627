"""A checkpoint from a stranger: whatever is in it, a sentence or a sound result, and nothing else happens.

`long_run.py` does the same for an hour; here hypothesis does it for seconds.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from headwise.io.reader import open_checkpoint
from tests.hostile import targets
from tests.hostile.guard import Guard, peak
from tests.hostile.mutations import dumps
from tests.hostile.targets import TARGETS, Prey
from tests.io.small import save_raw

QUICK = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prey]:
    yield Prey(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", [name for name, (_, weight) in TARGETS.items() if weight > 10])
def test_nothing_escapes(prey: Prey, name: str) -> None:
    @QUICK
    @given(st.integers(0, 2**32))
    def attack(seed: int) -> None:
        outcome = TARGETS[name][0](prey, Random(seed))
        assert not outcome.escapes, outcome

    attack()


@pytest.mark.parametrize("name", [name for name, (_, weight) in TARGETS.items() if weight <= 10])
def test_nothing_escapes_a_whole_conversion(prey: Prey, name: str) -> None:
    for seed in range(6):
        outcome = TARGETS[name][0](prey, Random(seed))
        assert not outcome.escapes, (seed, outcome)


def test_the_guard_sees_what_it_watches_for(prey: Prey, tmp_path: Path) -> None:
    import socket
    import subprocess

    def asking() -> None:
        input("trust? ")

    def burning() -> None:
        while True:
            pass

    for bad, word in (
        (lambda: (tmp_path / "elsewhere").write_text("x"), "open"),
        (lambda: os.system("true"), "os.system"),
        (lambda: subprocess.run(["true"]), "subprocess"),
        (lambda: socket.create_connection(("127.0.0.1", 9), 0.1), "socket"),
        (lambda: exec(compile("1", str(prey.model / "modeling_evil.py"), "exec")), "compile"),
        (asking, "asked"),
        (lambda: {}["x"], "bug: KeyError"),
        (lambda: print("\x1b[2J"), "control characters"),
    ):
        found = prey.guard.watch(bad).escapes
        assert any(word in escape for escape in found), (word, found)
    quick = Guard(prey.home / "model", prey.home / "work", seconds=0.2)
    assert quick.watch(burning).kind == "overtime"


def test_a_tokenizer_that_brings_code_is_not_run_and_nobody_is_asked(prey: Prey) -> None:
    lure = {"auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}, "tokenizer_class": "Evil"}
    model = prey.lay(**{"tokenizer_config.json": dumps(lure).encode()})
    targets._with_evil(model)
    outcome = prey.judge(lambda: convert_model(model, prey.out, to="gqa", groups=2))
    assert outcome.kind == "refused" and not outcome.escapes
    assert "no tokenizer that transformers can load" in outcome.message


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_that_names_a_kernel_on_the_hub_is_refused(prey: Prey, key: str) -> None:
    for value in ("stranger/kernel", {"": "stranger/kernel@v1"}):
        model = prey.lay(**{"config.json": dumps(prey.config | {"text_config": {key: value}}).encode()})
        outcome = prey.judge(lambda model=model: open_checkpoint(model))  # type: ignore[misc]
        assert "names code on the Hub" in outcome.message and not outcome.escapes


def test_what_a_config_says_of_code_is_not_passed_on(prey: Prey) -> None:
    lure = {"auto_map": {"AutoConfig": "evil.Evil"}, "_attn_implementation": "flash_attention_2"}
    model = prey.lay(**{"config.json": dumps(prey.config | lure).encode()})
    outcome = prey.judge(
        lambda: (convert_model(model, prey.out, to="gqa", groups=2, calibrate="none"), _config(prey.out))
    )
    assert outcome.kind == "done" and not outcome.escapes
    assert not outcome.value[1].keys() & lure.keys()


def _config(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "config.json").read_text())
    return found


def test_laughing_recipes_stay_small(prey: Prey) -> None:
    laughs = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    model = prey.lay("config.json", **{"recipe.yaml": "\n".join([*laughs, "about: *a39"]).encode()})
    from headwise.recipes.settings import load_uptrain_recipe

    outcome = prey.judge(lambda: load_uptrain_recipe(model / "recipe.yaml"))
    assert "aliases" in outcome.message and not outcome.escapes


@pytest.mark.parametrize("filling", ["[],", '"":', "[" * 3000, "0,"])
def test_a_header_of_a_hundred_megabytes(prey: Prey, filling: str) -> None:
    header = (b'{"a":[' + filling.encode() * (99_000_000 // len(filling)))[:99_000_000]
    model = prey.lay("config.json")
    save_raw(model / "model.safetensors", header, b"")
    before, began = peak(), time.process_time()
    outcome = Guard(model, prey.home / "work", seconds=10, memory=600 << 20).watch(lambda: open_checkpoint(model))
    print(filling[:5], round(time.process_time() - began, 1), "s", (peak() - before) >> 20, "MiB")
    assert outcome.kind == "refused" and not outcome.escapes


def test_what_a_library_logs_of_a_config_is_clean() -> None:
    from headwise._cli import console

    console.clean_logs()
    heard: list[str] = []
    logger, handler = logging.getLogger("headwise.test"), logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.error("rope_type=%s", "\x1b[2J\nred")
    logger.removeHandler(handler)
    assert heard == ["rope_type=\\x1b[2J\nred"]


def test_an_hour_is_not_needed_to_refuse_ten_thousand_layers(prey: Prey) -> None:
    model = prey.lay(**{"config.json": dumps(prey.config | {"num_hidden_layers": 10_000}).encode()})
    outcome = prey.judge(lambda: convert_model(model, prey.out, to="gqa", groups=2, calibrate="none", dry_run=True))
    assert "far more than its files hold" in outcome.message and not outcome.escapes


def test_memory_that_a_config_asks_for_is_not_given(prey: Prey) -> None:
    for name in ("vocab_size", "intermediate_size"):
        model = prey.lay(**{"config.json": dumps(prey.config | {name: 10**12}).encode()})
        outcome = prey.judge(lambda model=model: verify_model(model))  # type: ignore[misc]
        assert outcome.kind == "done" and not outcome.value.passed and not outcome.escapes, outcome
        assert "disagree on model." in outcome.value.checks[0].detail
        outcome = prey.judge(lambda model=model: inspect_model(model))  # type: ignore[misc]
        assert outcome.kind == "refused" and not outcome.escapes, outcome


def test_a_pickle_that_repeats_a_number_for_ever(prey: Prey) -> None:
    model = prey.lay("config.json")
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, model / "pytorch_model.bin")
    outcome = prey.judge(lambda: open_checkpoint(model, allow_pickle=True))
    assert "not a table of" in outcome.message and not outcome.escapes
