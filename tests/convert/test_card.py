"""The model card and the record beside it."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from headwise.convert.card import inherited, make_card, make_record
from headwise.convert.checkpoint import open_checkpoint
from tests.convert.test_plan import model, plan_for

__all__ = ["model"]

LAYERS = [{"key_error": 0.1, "value_error": 0.5}, {"key_error": 0.4, "value_error": 0.2, "groups": [[0, 1]]}]
COMMAND = "headwise convert parent out --to gqa --groups 4"


def record_of(model, **options):
    hashes = {"b": "22", "a": "11"}
    return make_record(plan_for(model, 4), open_checkpoint(model), command=COMMAND, hashes=hashes, **options)


def test_record_holds_what_is_needed_to_repeat_the_conversion(model):
    record = record_of(model, layers=LAYERS, seed=3, verification={"reloaded": True})
    assert json.loads(json.dumps(record)) == record
    assert list(record["sha256"]) == ["a", "b"] and record["seed"] == 3
    assert record["source"]["files"].keys() == {path.name for path in model.glob("*.safetensors")}
    assert record["cache"]["before"]["bytes_per_token"] == 2 * record["cache"]["after"]["bytes_per_token"]
    assert str(model.parent) not in json.dumps(record), "where a user keeps files is not published"


def test_card_shows_the_change_and_repeats_itself(model):
    plan, record = plan_for(model, 4), record_of(model, layers=LAYERS, verification={"reloaded": "passed"})
    text = make_card(plan, record)
    assert text == make_card(plan, record)
    assert "| attention | MHA (8 KV heads) | GQA (4 KV heads) |" in text
    assert "| key error | 0.2500 | 0.4000 (layer 1) |" in text
    assert "reloaded: passed" in text and COMMAND in text
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and "gqa" in data["tags"]
    assert "base_model" not in data, "a local folder is no repository"


def test_card_names_the_repository_it_came_from(model):
    from dataclasses import replace

    plan = replace(plan_for(model, 4), model="org/name", revision="c0ffee")
    data = ModelCard(make_card(plan, record_of(model))).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/name", "finetune")


def test_card_says_when_nothing_was_checked_or_approximated(model):
    text = make_card(plan_for(model, 8), record_of(model))
    assert "--no-verify" in text and "No layer was approximated" in text


def test_licence_comes_from_the_source(model, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: llama2\nlanguage: [en, de]\ntags: [chat]\n---\n# Parent\n")
    data = ModelCard(make_card(plan_for(model, 4), record_of(model), card)).data.to_dict()
    assert (data["license"], data["license_name"], data["language"]) == ("other", "llama2", ["en", "de"])
    assert "chat" not in data["tags"]


@pytest.mark.parametrize(
    "front",
    [
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "no front matter",
        "---\n!!python/x y\n---\n",
        "---\nlicense: {a: b}\nlanguage: [1, [2]]\n---\n",
        "---\nlicense: mit\n---\n" + "x" * 2_000_000,
    ],
)
def test_a_card_that_cannot_be_used_is_ignored(tmp_path, front):
    card = tmp_path / "README.md"
    card.write_text(front)
    assert inherited(card) == {} and inherited(tmp_path / "none") == {} and inherited(None) == {}
