"""The model card and the record beside it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from headwise.io.reader import open_checkpoint
from headwise.records.card import command_of, inherited, make_card, make_record, with_section
from tests.convert.test_plan import model, plan_for

__all__ = ["model"]

LAYERS = {
    0: {"key_error": 0.1, "value_error": 0.5, "refit": {"before": 0.5, "after": 0.1, "steps": 30}},
    1: {"key_error": 0.4, "value_error": 0.2, "groups": [[0, 1]]},
}
PASSED = {"passed": True, "checks": [{"name": "logits", "passed": True, "detail": "equal to 1e-7"}]}


def record_of(model, layers=LAYERS, **options):
    hashes = {"b": "22", "a": "11"}
    return make_record(
        plan_for(model, 4),
        open_checkpoint(model),
        out="out",
        hashes=hashes,
        files={},
        layers=layers,
        device="cpu",
        **options,
    )


def test_record_holds_what_is_needed_to_repeat_the_conversion(model):
    record = record_of(model, verification=PASSED)
    assert json.loads(json.dumps(record)) == record
    assert list(record["sha256"]) == ["a", "b"] and record["layers"]["1"]["groups"] == [[0, 1]]
    assert record["source"]["files"].keys() == {path.name for path in model.glob("*.safetensors")}
    assert record["cache"]["before"]["bytes_per_token"] == 2 * record["cache"]["after"]["bytes_per_token"]
    assert str(model.parent) not in json.dumps(record), "where a user keeps files is not published"


def test_the_command_repeats_every_decision(model):
    plan = replace(plan_for(model, 4), model="org/name", revision="c0ffee")
    assert (
        command_of(plan, "a folder")
        == "headwise convert org/name@c0ffee 'a folder' --to gqa --groups 4 --calibrate none"
    )
    measured = {"text": "builtin", "sequences": 8, "length": 512, "steps": 0, "seed": 3, "keep": None}
    arguments = {"to": "mla", "rank": 16, "exact": True, "calibration": measured, "seed": 3}
    assert command_of(replace(plan, arguments=arguments), "out", verified=False) == (
        "headwise convert org/name@c0ffee out --to mla --rank 16 --exact --seed 3 "
        "--calibrate builtin --calibration-tokens 4096 --refit off --no-verify"
    )


def test_card_shows_the_change_and_repeats_itself(model):
    plan, record = plan_for(model, 4), record_of(model, verification=PASSED)
    text = make_card(plan, record)
    assert text == make_card(plan, record)
    assert "| attention | MHA (8 KV heads) | GQA (4 KV heads) |" in text
    assert "| key error | 0.2500 | 0.4000 (layer 1) |" in text
    assert "| refit after | 0.1000 | 0.1000 (layer 0) |" in text
    assert "- logits: passed. equal to 1e-7" in text and record["command"] in text
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and "gqa" in data["tags"]
    assert "base_model" not in data, "a local folder is no repository"


def test_card_names_the_repository_it_came_from(model):
    plan = replace(plan_for(model, 4), model="org/name", revision="c0ffee")
    data = ModelCard(make_card(plan, record_of(model))).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/name", "finetune")


def test_card_says_when_nothing_was_checked_or_approximated(model):
    text = make_card(plan_for(model, 8), record_of(model, layers={}))
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


CARD = """---
license: mit
---

# Title

Words.

## Errors

None.

## Command

```
## not a heading
~~~
## nor this
```
"""


def test_a_section_is_added_once_and_then_replaced():
    once = with_section(CARD, "Training", "1 token.\n\n### Data\n\nCode.")
    assert once == CARD + "\n## Training\n\n1 token.\n\n### Data\n\nCode.\n"
    assert with_section(once, "Training", "2 tokens.\n") == CARD + "\n## Training\n\n2 tokens.\n"
    assert with_section(once, "Errors", "Some.") == once.replace("None.", "Some.")


def test_a_new_section_can_go_before_another():
    made = with_section(CARD, "Evaluation", "Better.", before="Errors")
    assert made == CARD.replace("## Errors", "## Evaluation\n\nBetter.\n\n## Errors")
    assert with_section(made, "Evaluation", "Worse.", before="Command") == made.replace("Better", "Worse")


def test_a_fence_hides_headings():
    assert with_section(CARD, "not a heading", "x") == CARD + "\n## not a heading\n\nx\n"
    assert with_section(CARD, "Command", "x").endswith("None.\n\n## Command\n\nx\n")
    assert with_section("", "A", "x") == "## A\n\nx\n"
