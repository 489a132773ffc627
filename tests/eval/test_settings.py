"""EvalSettings and EvalRecipe: every rule holds from Python and from the command line, with the same sentence."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headwise import evaluate_model
from headwise._cli.app import with_flags
from headwise.cli import cli
from headwise.errors import HeadwiseError, SettingError
from headwise.eval import evaluate
from headwise.eval.settings import (
    DEFAULT_RECIPE,
    LIBRARY,
    EvalRecipe,
    EvalSettings,
    is_eval_recipe,
    load_eval_recipe,
)
from headwise.fields import flag_of, settings_of

DECLARED = settings_of(EvalSettings)
VERB = cli.commands["eval"]


class Reached(Exception):
    """The settings were accepted."""


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop every evaluation at the first step after its settings."""

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setattr(evaluate, "find_model", reached)


def from_python(values: dict[str, Any]) -> str | None:
    """Return the message of a refusal, None if the settings are accepted."""
    try:
        evaluate_model("child", **values)
    except SettingError as error:
        return with_flags(error.message, VERB)
    except Reached:
        return None
    raise AssertionError("evaluate_model neither refused nor continued")


def from_shell(values: dict[str, Any]) -> str | None:
    """Return the message of a refusal, None if the command line is accepted."""
    words = ["eval", "child"]
    for name, value in values.items():
        spelling = flag_of(name, DECLARED[name][1])
        value = ",".join(value) if name == "tasks" and not isinstance(value, str) else value
        for item in value if name == "include_path" and not isinstance(value, str) else [value]:
            words += [spelling] if DECLARED[name][1].is_flag else [f"{spelling}={item}"]
    result = CliRunner().invoke(cli, words)
    if isinstance(result.exception, Reached) or "headwise failed: Reached" in result.stderr:
        return None
    assert result.exit_code == 2, result.output
    return result.stderr.removeprefix("Error: ").splitlines()[0]


def refusals() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield every rule: the field that the error names, a call that breaks the rule, words of the message."""
    parent = {"baseline": "parent"}
    yield "fail_above", parent | {"fail_above": 1.5}, "is 1.5, which is not a fraction"
    yield "fail_above", parent | {"fail_above": -0.1}, "is -0.1, which is not a fraction"
    for limit in (0.0, 1.5, -3.0, float("nan"), float("inf")):
        yield "limit", {"limit": limit}, "which is not a number of questions or a share below 1."
    for batch_size in (0, -1, "auto:", "auto:x", "automatic"):
        yield "batch_size", {"batch_size": batch_size}, "which is not a number of at least 1, auto or auto:N."
    yield "num_fewshot", {"num_fewshot": -1}, "is -1, which is not a whole number of at least 0."
    yield "seed", {"seed": -1}, "is -1, which is not a whole number of at least 0."
    yield "backend", {"backend": "vlm"}, "is 'vlm', which is not one of hf, vllm."
    yield "dtype", {"dtype": "float8"}, "is 'float8', which is not one of auto, bfloat16, float16, float32."
    yield "tasks", {"tasks": ","}, "is ',', which is not a list such as hellaswag,arc_easy."
    yield "online", {"online": True}, "but the recipe quick has none."
    yield "online", {"online": True, "recipe": "standard"}, "but the recipe standard has none."
    yield "online", {"online": True, "tasks": ["arc_easy"]}, "but without a recipe there are none."
    for name in ("baseline", "recipe", "device"):
        yield name, {name: ""}, "is '', which is not"


@pytest.mark.usefixtures("accepted")
@pytest.mark.parametrize(("field", "values", "words"), list(refusals()))
def test_a_wrong_setting_has_one_message(field: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        evaluate_model("child", **values)
    assert caught.value.field == field and f"`{field}`" in caught.value.message
    message = from_python(values)
    assert message == from_shell(values)
    assert message is not None and words in message and flag_of(field, DECLARED[field][1]) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tasks", "arc_easy"),
        ("tasks", 3),
        ("include_path", "folder"),
        ("limit", True),
        ("limit", "10"),
        ("seed", True),
    ],
)
def test_values_that_only_python_can_give_are_refused(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"`{name}` is {value!r}, which is not"):
        EvalSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.usefixtures("accepted")
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"baseline": "parent", "fail_above": 0.0, "cache": False},
        {"limit": 10, "batch_size": "auto:4", "num_fewshot": 0},
        {"limit": 0.25, "batch_size": "auto"},
        {"recipe": "long-context", "online": True},
        {"tasks": ["arc_easy", "mmlu_*"], "include_path": ["a", "b"]},
    ],
)
def test_legal_settings_are_accepted(values: dict[str, Any]) -> None:
    assert from_python(values) is None and from_shell(values) is None


def test_python_and_the_command_line_have_every_field() -> None:
    parameters = inspect.signature(evaluate_model).parameters
    assert set(parameters) - {"child", "token", "progress"} == set(DECLARED)
    assert {param.name for param in VERB.params} >= set(DECLARED)
    for name, (declared, _) in DECLARED.items():
        assert parameters[name].default == declared.default, name


def test_settings_are_frozen_and_legal_values_have_one_form() -> None:
    settings = EvalSettings(tasks=["a", "b"], include_path=["x", Path("y")], limit=8.0)  # type: ignore[arg-type]
    assert settings.tasks == ("a", "b") and settings.include_path == (Path("x"), Path("y"))
    assert settings.limit == 8 and isinstance(settings.limit, int)
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]


def test_the_device_decides_precision_and_batch_size() -> None:
    settings, recipe = EvalSettings(), EvalRecipe(about="", limit=5, num_fewshot=2)
    on_cpu, on_gpu = settings.resolve(recipe, "cpu"), settings.resolve(recipe, "cuda")
    assert (on_cpu.dtype, on_cpu.batch_size, on_cpu.device) == ("float32", 16, "cpu")
    assert (on_gpu.dtype, on_gpu.batch_size, on_gpu.device) == ("auto", "auto", "cuda")
    assert (on_cpu.limit, on_cpu.num_fewshot) == (5, 2)
    given = EvalSettings(dtype="bfloat16", batch_size=3).resolve(recipe, "cpu")
    assert (given.dtype, given.batch_size) == ("bfloat16", 3)


def test_tasks_and_options_are_added_to_the_recipe() -> None:
    alone = EvalSettings(tasks=("arc_easy",)).choose_recipe()
    assert alone.tasks == ["arc_easy"] and alone.perplexity is None
    both = EvalSettings(recipe="quick", tasks=("arc_easy", "headwise_cloze_code"), limit=3).choose_recipe()
    assert both.tasks == ["headwise_cloze_code", "headwise_cloze_prose", "arc_easy"] and both.limit == 3
    assert EvalSettings().recipe_name == DEFAULT_RECIPE and EvalSettings(tasks=("a",)).recipe_name is None
    online = EvalSettings(recipe="long-context", online=True).choose_recipe()
    assert online.tasks == ["headwise_passkey", *load_eval_recipe("long-context").online]


@pytest.mark.parametrize(
    "values",
    [
        {"baseline": "org/parent", "fail_above": 0.01, "report": Path("out put"), "limit": 0.5},
        {"recipe": "long-context", "online": True, "seed": 7},
        {"tasks": ("a", "b"), "include_path": (Path("x"), Path("y")), "backend": "vllm", "num_fewshot": 0},
        {},
    ],
)
def test_the_command_line_repeats_the_evaluation(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *args, **options: calls.append(options))
    settings = EvalSettings(**values)
    settings = settings.resolve(settings.choose_recipe(), "cpu")
    headwise, verb, *words = shlex.split(settings.command("child"))
    assert (headwise, verb) == ("headwise", "eval")
    result = CliRunner().invoke(cli, ["eval", *words])
    assert result.exit_code == 0, result.output
    (options,) = calls
    repeated = EvalSettings(
        **{name: value for name, value in options.items() if name in DECLARED} | _baseline(settings)
    )
    assert repeated == EvalSettings(**{**vars(settings), "recipe": settings.recipe_name})


def _baseline(settings: EvalSettings) -> dict[str, Any]:
    """`evaluate_model` takes the baseline as a positional argument."""
    return {"baseline": settings.baseline}


@pytest.mark.parametrize("name", ["quick", "standard", "long-context"])
def test_the_recipes_of_the_library_are_legal(name: str) -> None:
    recipe = load_eval_recipe(name)
    assert recipe.about and json.loads(json.dumps(recipe.recorded())) == recipe.recorded()
    assert "about" not in recipe.recorded()
    assert is_eval_recipe(name) and (LIBRARY / f"{name}.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("about: x\ngeneration: {promts: 3}", "unknown key generation.promts.*Did you mean generation.prompts"),
        (
            "about: x\ngeneration: {prompts: 0}",
            "`generation.prompts` is 0, which is not a whole number of at least 1",
        ),
        ("about: x\nperplexity: {blocks: many}", "`perplexity.blocks` is 'many', which is not"),
        ("about: x\npasskey: {lengths: [2.0]}", "`passkey.lengths` is .*, which is not a list of fractions"),
        ("about: x\npasskey: {lengths: 1}", "`passkey.lengths` is 1, which is not a list of fractions"),
        ("about: x\nlimit: 1.5", "`limit` is 1.5, which is not a number of questions"),
        ("about: x\nacceptance: {prompts: 3}", "`acceptance` uses the text of `generation`, which is missing"),
        ("about: x\ndiagnostics: {blocks: 3}", "`diagnostics` uses the text of `perplexity`, which is missing"),
        ("tasks: [a]", "about is missing"),
        ("about: [", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_key(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(HeadwiseError, match=words) as caught:
        load_eval_recipe(path)
    assert str(path) in str(caught.value)


def test_recipes_of_both_kinds_are_listed_shown_and_checked(tmp_path: Path) -> None:
    def recipes(*arguments: object) -> Result:
        return CliRunner().invoke(cli, ["recipes", *map(str, arguments)])

    listed = json.loads(recipes("list", "--json").stdout)
    assert set(listed["eval"]) == {"quick", "standard", "long-context", "retrieval"}
    assert "long-context" in listed["uptrain"]
    assert "headwise_cloze_code" in recipes("show", "quick").stdout
    assert "batch_tokens" in recipes("show", "long-context").stdout
    assert "headwise_passkey" in recipes("show", "long-context", "--eval").stdout
    path = tmp_path / "recipe.yaml"
    path.write_text("about: A little text.\nperplexity: {length: 64, blocks: 4}\n")
    assert recipes("validate", path).exit_code == 0
    path.write_text("about: A slip.\ngeneration: {promts: 3}\n")
    result = recipes("validate", path)
    assert result.exit_code == 2 and "generation.promts" in result.stderr and "prompts" in result.stderr
    path.write_text("about: Half of it.\nacceptance: {prompts: 3}\n")
    assert "`generation`, which is missing" in recipes("validate", path).stderr


def test_chat_evaluation_needs_one_template_for_both_models() -> None:
    chat, other = SimpleNamespace(chat_template="{{ messages }}"), SimpleNamespace(chat_template="{{ other }}")
    evaluate.check_chat_template(chat, chat)
    evaluate.check_chat_template(chat, None)
    for child, parent, words in ((SimpleNamespace(), None, "no chat template"), (chat, other, "different chat")):
        with pytest.raises(SettingError, match=words):
            evaluate.check_chat_template(child, parent)
