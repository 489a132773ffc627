"""A recipe is checked before anything runs, and says where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.recipes.settings import LIBRARY, load_uptrain_recipe

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


def test_settings_are_laid_over_in_order(recipe: Path) -> None:
    read = load_uptrain_recipe(
        recipe,
        ["train.seed=1", "train.seed=2", "train.seconds=60", "data.text.packages=3", "train.compile=true"],
    )
    assert (read.train.seed, read.train.seconds, read.train.compile) == (2, 60.0, True)
    assert read.data.text == {"builtin": 1, "packages": 3}
    assert load_uptrain_recipe(recipe, ["data.text={x.txt: 2}"]).data.text == {"x.txt": 2}
    assert load_uptrain_recipe(recipe, ["train.seconds=null"]).train.seconds is None


def test_settings_are_laid_over_a_recipe_that_was_read(recipe: Path) -> None:
    read = load_uptrain_recipe(recipe)
    assert load_uptrain_recipe(read) == read
    settings = ["layerwise.tokens=5", "train.lora.rank=4", "train.parameters=attention"]
    assert load_uptrain_recipe(read, settings) == load_uptrain_recipe(recipe, settings)


def test_a_setting_is_checked_like_the_file(recipe: Path) -> None:
    with pytest.raises(
        HeadwiseError, match=r"unknown key train\.learning_rat\..*Did you mean train\.learning_rate\?"
    ):
        load_uptrain_recipe(recipe, ["train.learning_rat=1"])
    with pytest.raises(HeadwiseError, match="not of the form"):
        load_uptrain_recipe(recipe, ["train.seed"])
    with pytest.raises(HeadwiseError, match="about has no keys"):
        load_uptrain_recipe(recipe, ["about.x=1"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.tokens=many", r"train\.tokens must be a whole number .*got 'many'"),
        ("train.tokens=1.5", r"train\.tokens must be a whole number"),
        ("train.tokens=1.2.3M", r"train\.tokens must be a whole number"),
        ("train.tokens=true", r"train\.tokens must be a whole number"),
        ("train.learning_rate=fast", r"train\.learning_rate must be a number"),
        ("train.compile=1", r"train\.compile must be true or false"),
        ("train.schedule=linear", r"train\.schedule must be one of cosine, wsd"),
        ("train.betas=0.9", r"train\.betas must be a list"),
        ("train.betas=[0.9, x]", r"train\.betas\.1 must be a number"),
        ("data.text=builtin", r"data\.text must be a mapping"),
        ("data.text.builtin=often", r"data\.text\.builtin must be a whole number"),
        ("data=3", r"data must be a mapping"),
        ("about=3", r"about must be text"),
        ("data.length=1", r"data\.length must be at least 2"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(recipe: Path, setting: str, message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        load_uptrain_recipe(recipe, [setting])


def test_a_missing_key_and_a_missing_recipe(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("about: x\ndata: {text: {}}\ntrain: {seed: 1}\n")
    with pytest.raises(HeadwiseError, match=r"train\.tokens is missing"):
        load_uptrain_recipe(path)
    with pytest.raises(HeadwiseError, match=r"no recipe 'pretrain-dmo'\. Did you mean pretrain-demo\?"):
        load_uptrain_recipe("pretrain-dmo")


@pytest.mark.parametrize("text", ["- a\n", "", "a: [", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(HeadwiseError, match=r"bad\.yaml"):
        load_uptrain_recipe(path)
