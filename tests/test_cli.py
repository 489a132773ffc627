"""The verbs: the options they pass on, the values they refuse, what they print, and their exit codes."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from headwise.cli import cli
from headwise.convert.pipeline import convert_model
from headwise.eval.evaluate import evaluate_model
from headwise.recipes.uptrain import uptrain_model
from tests.command_line import CONVERT, config_folder, library, run

__all__ = ["config_folder", "library"]

TO_GQA = [*CONVERT, "--to", "gqa"]
TO_MQA = [*CONVERT, "--to", "mqa"]
TO_MLA = [*CONVERT, "--to", "mla"]
CONTEXT = [*CONVERT, "--context", "99"]
EVAL = ["eval", "out"]
UPTRAIN = ["uptrain", "model"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["convert"], "Missing argument 'MODEL'"),
        (["convert", "model"], "Missing argument 'OUT'"),
        (CONVERT, "nothing to change"),
        ([*CONVERT, "--to", "gaq"], "Did you mean 'gqa'?"),
        (TO_GQA, "--to gqa needs --groups"),
        ([*TO_GQA, "--groups", "0"], "--groups is 0"),
        ([*TO_GQA, "--groups", "two"], "--groups is 'two'"),
        ([*TO_GQA, "--groups", "2", "--method", "optimum"], "Did you mean 'optimal'?"),
        ([*TO_GQA, "--groups", "2", "--method", "transmla"], "has no method 'transmla'"),
        ([*TO_MLA, "--exact", "--groups", "2"], "--groups acts only with --to gqa"),
        ([*TO_MQA, "--groups", "1"], "--groups acts only with --to gqa"),
        ([*CONVERT, "--to", "mha", "--calibrate", "none"], "--calibrate acts only with"),
        ([*CONTEXT, "--refit", "off"], "--refit acts only with"),
        (TO_MLA, "--to mla needs --cache"),
        ([*TO_MLA, "--rank", "64"], "--rank needs --rope-dim"),
        ([*TO_MLA, "--rope-dim", "64"], "--rope-dim needs --rank"),
        ([*TO_MLA, "--cache", "12.5%", "--rank", "64", "--rope-dim", "8"], "contradict"),
        ([*TO_MLA, "--exact", "--refit", "off"], "contradict"),
        ([*TO_MLA, "--cache", "120%"], "a fraction above 0 and up to 1 (100%), such as 0.125 or 12.5%"),
        ([*TO_MQA, "--refit", "never"], "--refit is 'never', which is not auto, off"),
        ([*TO_MQA, "--moments", "a", "--save-moments", "b"], "contradict"),
        ([*TO_MQA, "--calibrate", "none", "--calibration-tokens", "9"], "--calibrate none"),
        ([*TO_MQA, "--rope", "ntk"], "--rope needs --context"),
        ([*CONTEXT, "--rope", "base"], "belong together"),
        ([*CONTEXT, "--rope", "ntk", "--rope-theta", "1e6"], "belong together"),
        ([*TO_MQA, "--window-layers", "all"], "--window-layers needs --sliding-window"),
        (["verify", "out", "--revision", "main"], "need --against"),
        (["verify", "out", "--hashes", "--against", "model"], "leave out --against"),
        ([*EVAL, "--fail-above", "1%"], "There is no folder out"),
        ([*EVAL, "--limit", "1.5"], "--limit is 1.5"),
        ([*EVAL, "--tasks", ","], "--tasks is ','"),
        ([*EVAL, "--backend", "vlm"], "Did you mean 'vllm'?"),
        ([*UPTRAIN, "--processes", "2"], "--processes needs --launch"),
        ([*UPTRAIN, "--tokens", "21M", "--fraction", "5%"], "contradict"),
        ([*UPTRAIN, "--set", "train.tokns=1"], "train.tokns"),
        (["bench", "out"], "give --baseline"),
        (["bench", "out", "--baseline", "model", "--memory", "much"], "a size such as 80GB"),
        (["bench", "out", "--baseline", "model", "--dtype", "bfloat"], "Did you mean 'bfloat16'?"),
        (["card", "out", "report", "--eval-result", "gpqa"], "TASK=DATASET:TASK_ID"),
        (["recipes", "show", "no-such-recipe"], "no recipe"),
        (
            ["recipes", "show", "retreival"],
            "Did you mean retrieval? The library has for `headwise uptrain`: ",
        ),
        (["recipes", "validate", "quik"], "for `headwise eval`: long-context, quick, retrieval, standard."),
        (["inspect", "no/such/folder"], "no/such/folder"),
        (["inspect", "model", "--plot", "x.png"], "--context"),
        (["inspect"], "Give MODEL, or --types"),
        (["inspect", "model", "--types"], "Give MODEL, or --types"),
        (["inspect", "--types", "--context", "99"], "leave out the other options"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(typed: list[str], message: str, library: SimpleNamespace) -> None:
    result = run(*typed)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not re.search(r"`\w+`", result.stderr), "a field name stands where a flag should"
    assert result.stdout == "" and not library.arguments


def test_supported_types_are_listed_by_family() -> None:
    families = json.loads(run("inspect", "--types", "--json").stdout)
    assert "qwen3" in families["language models"]
    shown = run("inspect", "--types").stdout
    assert all(name in shown for types in families.values() for name in types)


def test_only_typed_options_are_passed_on(library: SimpleNamespace) -> None:
    assert run(*TO_GQA, "--groups", "2", "--no-verify", "--refit", "50").exit_code == 0
    assert library.arguments == {
        "model": "model",
        "out": Path("out"),
        "to": "gqa",
        "groups": 2,
        "verify": False,
        "refit": 50,
    }
    assert run(*TO_MLA, "--cache", "12.5%").exit_code == 0
    assert library.arguments == {"model": "model", "out": Path("out"), "to": "mla", "cache": 0.125}


@pytest.mark.parametrize(
    ("verb", "function", "others"),
    [
        ("convert", convert_model, set()),
        ("uptrain", uptrain_model, {"command"}),
        ("eval", evaluate_model, set()),
    ],
)
def test_every_option_is_a_parameter_of_the_function(verb: str, function: object, others: set[str]) -> None:
    assert callable(function)
    parameters = inspect.signature(function).parameters.keys() - {"progress"} - others
    names = {param.name for param in cli.commands[verb].params} - {"json", "quiet", "verbose"}
    assert {"child" if verb == "eval" and name == "out" else name for name in names} == parameters


def test_a_failed_gate_exits_1_and_prints_its_object(library: SimpleNamespace) -> None:
    library.action = lambda **_: SimpleNamespace(passed=False, accepted=(), to_dict=lambda: {"passed": False})
    result = run("verify", "out", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout) == {"passed": False}
    assert "failed its checks" in result.stderr


def test_inspect_prints_a_table_or_json(config_folder: str) -> None:
    table = run("inspect", config_folder)
    assert table.exit_code == 0 and "GQA" in table.stdout and "MQA" in table.stdout and table.stderr == ""
    inspection = json.loads(run("inspect", config_folder, "--json").stdout)
    # 4 KV heads, keys and values of 8 numbers, 2 bytes, 3 layers
    assert inspection["cache"]["bytes_per_token"] == 4 * 2 * 8 * 2 * 3


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout.split()[-1] == importlib.metadata.version("headwise")


def test_recipes_are_listed_shown_and_validated() -> None:
    recipes = json.loads(run("recipes", "list", "--json").stdout)
    assert "distill" in recipes["uptrain"] and "quick" in recipes["eval"]
    shown = run("recipes", "show", "distill")
    assert shown.exit_code == 0 and recipes["uptrain"]["distill"].split()[0] in shown.stdout
    assert "perplexity" in json.loads(run("recipes", "show", "quick", "--json").stdout)
    for verb, names in recipes.items():
        for name in names:
            flags = ["--eval"] if verb == "eval" else []
            assert run("recipes", "validate", name, *flags).exit_code == 0, name
