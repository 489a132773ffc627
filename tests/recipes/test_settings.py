"""Recipes and settings are checked before anything runs, and errors name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headwise.errors import HeadwiseError, SettingError
from headwise.recipes.settings import (
    LIBRARY,
    Data,
    Layerwise,
    Lora,
    Loss,
    TeacherSettings,
    Training,
    UptrainRecipe,
    UptrainSettings,
    load_uptrain_recipe,
)

RECIPE = """
about: a test
data: {text: {builtin: 1}}
train: {tokens: 21M, learning_rate: 3e-4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in LIBRARY.glob("*.yaml")))
def test_every_recipe_of_the_library_is_valid_and_says_when_to_use_it(name: str) -> None:
    assert load_uptrain_recipe(name).about.strip()
    assert (LIBRARY / f"{name}.yaml").read_text().startswith("# ")


def test_numbers_as_people_write_them(recipe: Path) -> None:
    train = load_uptrain_recipe(recipe).train
    assert (train.tokens, train.learning_rate) == (21_000_000, 3e-4)
    assert load_uptrain_recipe(recipe, ["train.tokens=1.5B"]).train.tokens == 1_500_000_000
    assert load_uptrain_recipe(recipe, ["train.tokens=2k"]).train.tokens == 2000


def test_the_learning_rate_follows_the_number_of_parameters() -> None:
    train = load_uptrain_recipe("distill").train
    assert train.usual_rate(1_000_000) == train.usual_rate(5_000_000) == 4e-4
    assert train.usual_rate(135_000_000) == pytest.approx(1e-4, rel=0.05)
    assert train.usual_rate(7_000_000_000) == pytest.approx(2e-5, rel=0.05)
    adapters = replace(train, parameters="attention", lora=Lora(rank=4))
    assert adapters.usual_rate(7_000_000_000) == pytest.approx(2e-4, rel=0.05)


def test_settings_are_laid_over_in_order(recipe: Path) -> None:
    read = load_uptrain_recipe(
        recipe,
        ["train.seed=1", "train.seed=2", "train.seconds=60", "data.text.packages=3", "train.compile=true"],
    )
    assert (read.train.seed, read.train.seconds, read.train.compile) == (2, 60.0, True)
    assert read.data.text == {"builtin": 1, "packages": 3}
    assert load_uptrain_recipe(recipe, ["data.text={x.txt: 2}"]).data.text == {"x.txt": 2}
    assert load_uptrain_recipe(recipe, ["train.seconds=null"]).train.seconds is None
    lengths = load_uptrain_recipe(recipe, ["data.length=4K", "train.batch_tokens=4K"])
    assert (lengths.data.length, lengths.train.batch_tokens) == (4096, 4000), "a length and a budget"


def test_settings_are_laid_over_a_recipe_that_was_read(recipe: Path) -> None:
    read = load_uptrain_recipe(recipe)
    assert load_uptrain_recipe(read) == read
    settings = ["layerwise.tokens=5", "train.lora.rank=4", "train.parameters=attention"]
    assert load_uptrain_recipe(read, settings) == load_uptrain_recipe(recipe, settings)


def test_a_setting_is_checked_like_the_file(recipe: Path) -> None:
    with pytest.raises(
        HeadwiseError, match=r"^`settings`: unknown key train\.learning_rat\..*Did you mean train\.learning_rate\?"
    ):
        load_uptrain_recipe(recipe, ["train.learning_rat=1"])
    with pytest.raises(HeadwiseError, match="not of the form"):
        load_uptrain_recipe(recipe, ["train.seed"])
    recipe.write_text(recipe.read_text() + "\nsurplus: 1\n")
    with pytest.raises(HeadwiseError, match=rf"^{recipe}: unknown key surplus"):
        load_uptrain_recipe(recipe, ["train.seed=1"])
    with pytest.raises(HeadwiseError, match="about is a plain value and has no keys"):
        load_uptrain_recipe(recipe, ["about.x=1"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.tokens=many", r"`train\.tokens` is 'many', which is not a whole number"),
        ("train.tokens=1.5", r"`train\.tokens` is 1\.5, which is not a whole number"),
        ("train.tokens=1.2.3M", r"`train\.tokens` is '1\.2\.3M', which is not a whole number"),
        ("train.tokens=true", r"`train\.tokens` is True, which is not a whole number"),
        ("train.learning_rate=fast", r"`train\.learning_rate` is 'fast', which is not a number above 0"),
        ("train.compile=1", r"`train\.compile` is 1, which is not True or False"),
        ("train.schedule=linear", r"`train\.schedule` is 'linear', which is not one of cosine, wsd"),
        ("train.betas=0.9", r"`train\.betas` is 0\.9, which is not a list of two numbers"),
        ("train.betas=[0.9, x]", r"`train\.betas` is \[0\.9, 'x'\], which is not a list of two numbers"),
        ("data.text=builtin", r"`data\.text` is 'builtin', which is not a mapping"),
        ("data.text.builtin=often", r"`data\.text\.builtin` is 'often', which is not a whole number"),
        ("data=3", r"`data` is 3, which is not a mapping"),
        ("about=3", r"`about` is 3, which is not a text"),
        ("data.length=1", r"`data\.length` is 1, which is not a whole number of at least 2"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(recipe: Path, setting: str, message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        load_uptrain_recipe(recipe, [setting])


def test_a_missing_key_and_a_missing_recipe(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("about: x\ndata: {text: {}}\ntrain: {seed: 1}\n")
    with pytest.raises(HeadwiseError, match=r"`train\.tokens` is missing \(or `train\.fraction`\)"):
        load_uptrain_recipe(path)
    with pytest.raises(HeadwiseError, match=r"no recipe 'two-stge'\. Did you mean two-stage\?"):
        load_uptrain_recipe("two-stge")


@pytest.mark.parametrize("text", ["- a\n", "", "a: [", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(HeadwiseError, match=r"bad\.yaml"):
        load_uptrain_recipe(path)


GOOD = UptrainRecipe("a test", Data({"builtin": 1}), Training(tokens=8))


@pytest.mark.parametrize(
    ("make", "field", "message"),
    [
        (lambda: Training(tokens=0), "tokens", "`tokens` is 0, which is not a whole number of at least 1"),
        (lambda: Training(fraction=0.0), "fraction", "`fraction` is 0.0, which is not a fraction above 0"),
        (lambda: Training(), "tokens", r"`tokens` is missing \(or `fraction`\)"),
        (lambda: Training(tokens=8, warmup=-0.1), "warmup", "`warmup` is -0.1"),
        (lambda: Training(tokens=8, lora=Lora()), "lora", "`parameters` is all: make it attention"),
        (lambda: Lora(rank=0), "rank", "`rank` is 0"),
        (lambda: Loss(), "kl", "The loss has no term"),
        (lambda: Loss(kl=-1.0), "kl", "`kl` is -1.0, which is not a number of at least 0"),
        (lambda: Loss(kl=1.0, temperature=0.0), "temperature", "`temperature` is 0.0"),
        (lambda: Layerwise(steps=0), "steps", "`steps` is 0"),
        (lambda: TeacherSettings(0), "topk", "`topk` is 0"),
        (lambda: replace(GOOD, train=None), "train", "trains nothing"),
        (lambda: replace(GOOD, data="builtin"), "data", "`data` is 'builtin', which is not a Data"),
        (
            lambda: replace(GOOD, train=Training(tokens=8, compile=True), loss=Loss(attention_outputs=1.0)),
            "train.compile",
            "needs the modules that `train.compile` fuses",
        ),
        (
            lambda: replace(GOOD, loss=Loss(hidden_states=1.0), teacher=TeacherSettings(4)),
            "teacher.topk",
            "`loss.hidden_states` needs the teacher beside the student",
        ),
        (
            lambda: replace(GOOD, loss=Loss(jsd=1.0), teacher=TeacherSettings(4)),
            "teacher.topk",
            "`loss.jsd` needs the teacher's whole distribution",
        ),
        (lambda: UptrainSettings(tokens=8, fraction=0.5), "tokens", "contradict each other"),
        (lambda: UptrainSettings(tokens=0), "tokens", "`tokens` is 0"),
        (lambda: UptrainSettings(fraction=1.5), "fraction", "`fraction` is 1.5"),
        (lambda: UptrainSettings(processes=2), "processes", "`processes` needs `launch`"),
        (lambda: UptrainSettings(launch="dpp"), "launch", "`launch` is 'dpp', which is not one of single, ddp"),
        (lambda: UptrainSettings(launch="ddp", processes=0), "processes", "`processes` is 0"),
        (lambda: UptrainSettings(launch="single", processes=2), "processes", "`launch` single starts one"),
        (lambda: UptrainSettings(recipe=GOOD, launch="ddp"), "launch", "read the recipe from its file"),
        (lambda: UptrainSettings(recipe="layerwise", tokens=8), "tokens", "no `train` section"),
        (
            lambda: UptrainSettings(accept="functon"),
            "accept",
            "which is not one or several of tensors, .*'function'",
        ),
        (lambda: UptrainSettings(accept=["cache", "all"]), "accept", "`accept` is 'cache', 'all', which"),
        (lambda: UptrainSettings(device="cuda:1"), "device", "`device` is 'cuda:1', which is not one of cpu, cuda"),
        (lambda: UptrainSettings(device="cpu", launch="ddp"), "device", "leave out `device`"),
        (lambda: UptrainSettings(heldout=""), "heldout", "`heldout` is ''"),
        (lambda: UptrainSettings(max_shard_size="much"), "max_shard_size", "not a size such as 5GB"),
        (lambda: UptrainSettings(settings="train.tokns=1"), "train.tokns", r"unknown key train\.tokns"),
    ],
)
def test_wrong_settings_are_named_by_their_field(make: Callable[[], Any], field: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as refused:
        make()
    assert refused.value.field == field


def test_a_rule_between_fields_has_the_path_of_the_section(recipe: Path) -> None:
    with pytest.raises(SettingError, match=r"`settings`: `train\.lora` .* `train\.parameters` is all") as refused:
        load_uptrain_recipe(recipe, ["train.lora.rank=4"])
    assert refused.value.field == "train.lora"


def test_a_plan_is_the_recipe_with_everything_laid_over_it(recipe: Path) -> None:
    settings = UptrainSettings(
        recipe=recipe,
        tokens=5,
        text=["a.txt", "b \N{GRINNING FACE}.txt"],
        heldout="c.txt",
        settings=["train.seed=3"],
    )
    assert settings.name == "mine"
    assert settings.plan.train is not None
    assert (settings.plan.train.tokens, settings.plan.train.seed) == (5, 3)
    assert settings.plan.data.text == {"a.txt": 1, "b \N{GRINNING FACE}.txt": 1}
    assert settings.plan.data.heldout == "c.txt"
    assert load_uptrain_recipe(recipe, settings.assignments) == settings.plan
    assert UptrainSettings(recipe=GOOD).plan == GOOD
    fraction = UptrainSettings(recipe=recipe, fraction=0.05).plan.train
    assert fraction is not None and (fraction.tokens, fraction.fraction) == (None, 0.05)


def test_the_budget_of_a_fraction() -> None:
    training = Training(fraction=0.05)
    assert training.budget(1001) == 51
    assert replace(training, pretraining_tokens=100).budget(1001) == 5
    with pytest.raises(SettingError, match="number of pretraining tokens is unknown"):
        training.budget()
