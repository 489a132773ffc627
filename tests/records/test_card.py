"""The model card."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from headwise.records.card import inherited, render_card, with_section
from tests.convert.test_plan import model, plan_for
from tests.records.test_manifest import PASSED, record_of

__all__ = ["model"]


def test_card_shows_the_change_and_repeats_itself(model):
    record = record_of(model, verification=PASSED)
    text = render_card(record)
    assert text == render_card(json.loads(json.dumps(record))), "the record alone decides"
    assert "| attention | MHA, 8 KV heads | GQA, 4 KV heads |" in text
    assert "| key error | 0.2500 | 0.4000 (layer 1) |" in text
    assert "| refit after | 0.1000 | 0.1000 (layer 0) |" in text
    assert "- logits: passed. equal to 1e-7" in text and record["command"] in text
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and "gqa" in data["tags"]
    assert "base_model" not in data, "a local folder is no repository"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"to": "gqa", "groups": 4, "method": "mean", "grouping": "contiguous"},
            "Method: merge `mean` (mean pooling; Ainslie et al. 2023, "
            "[arXiv 2305.13245](https://arxiv.org/abs/2305.13245)), grouping `contiguous` (neighbouring heads; "
            "Ainslie et al. 2023, [arXiv 2305.13245](https://arxiv.org/abs/2305.13245)).",
        ),
        (
            {"to": "gqa", "groups": 4, "method": "optimal", "grouping": "optimal"},
            "Method: merge `optimal` (weighted PCA), grouping `optimal` (least residual energy).",
        ),
        (
            {"to": "mqa", "method": "first", "grouping": "contiguous"},
            "Method: merge `first` (first head).",
        ),
        (
            {"to": "mla", "method": "transmla", "rope": "ntk", "context": 4096},
            "Method: latent `transmla` (RoRoPE, FreqFold and joint PCA; Meng et al. 2025, "
            "[arXiv 2502.07864](https://arxiv.org/abs/2502.07864)), RoPE rule `ntk` (NTK-aware base).",
        ),
        ({"to": "mla", "exact": True}, None),
        ({"context": 4096, "rope": "auto"}, None),
        ({"to": "gqa", "groups": 4, "method": "of a later version"}, None),
    ],
)
def test_card_cites_the_methods(model, arguments, line):
    text = render_card(record_of(model, plan=replace(plan_for(model, 4), arguments=arguments)))
    assert [row for row in text.splitlines() if row.startswith("Method:")] == ([line] if line else [])


def test_card_cites_no_merge_where_heads_are_copied(model):
    arguments = {"to": "mha", "method": "mean", "grouping": "contiguous"}
    assert "Method:" not in render_card(record_of(model, plan=replace(plan_for(model, 8), arguments=arguments)))


def test_card_names_the_repository_it_came_from(model):
    plan = replace(plan_for(model, 4), model="org/name", revision="c0ffee")
    data = ModelCard(render_card(record_of(model, plan=plan))).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/name", "finetune")


def test_card_loads_the_model_and_warns_until_it_is_measured(model):
    loss = {"source": "mixture", "tokens": 70, "before": 2.0, "after": 2.5, "text": None, "samples": None}
    text = render_card(record_of(model, text_loss=loss))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    ast.parse(code)
    assert (
        "from transformers import AutoModelForCausalLM, AutoTokenizer" in code and 'from_pretrained("OUT"' in code
    )
    assert "> [!WARNING]\n> The quality of this model was not measured" in text
    assert "base model\n2.0000, this model 2.5000 (+0.5000)." in text
    assert "- Licence: that of the base model, which names none" in text
    assert ModelCard(text).data.pipeline_tag == "text-generation"
    measured = with_section(text, "Evaluation", "No loss.")
    assert "WARNING" not in measured and measured.count("## Evaluation") == 1
    images = {"class": "LlavaForConditionalGeneration", "auto_class": "AutoModelForImageTextToText"}
    seeing = record_of(model) | images
    assert render_card(seeing) == render_card(
        {name: value for name, value in seeing.items() if name != "auto_class"}
    )
    assert "AutoModelForImageTextToText, AutoProcessor" in render_card(seeing)
    assert 'processor(text="Once upon a time"' in render_card(seeing)
    pairs = {"class": "T5GemmaForConditionalGeneration", "auto_class": "AutoModelForSeq2SeqLM"}
    assert "AutoModelForSeq2SeqLM, AutoTokenizer" in render_card(record_of(model) | pairs)
    speech = {"class": "DiaForConditionalGeneration", "auto_class": "AutoModelForSpeechSeq2Seq"}
    assert "AutoModelForSpeechSeq2Seq, AutoProcessor" in render_card(record_of(model) | speech)
    assert "Once upon a time" not in render_card(record_of(model) | speech)
    headless = render_card(record_of(model) | {"class": "LlamaModel"})
    assert "AutoModel, AutoTokenizer" in headless and "generate(" not in headless and "pipeline_tag" not in headless
    exact = record_of(model) | {"exact": True}
    assert "WARNING" not in render_card(exact) and "conversion is exact" in render_card(exact)


def test_card_of_a_chat_model_asks_in_its_template(model, tmp_path):
    """The template is a file of its own, or an entry of the tokenizer's config beside the source's card."""
    as_file = render_card(record_of(model) | {"files": {"chat_template.jinja": "00"}})
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    in_config = render_card(record_of(model), tmp_path / "README.md")
    for text in (as_file, in_config):
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        ast.parse(code)
        assert "tokenizer.apply_chat_template(" in code and "Once upon a time" not in code
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "Once upon a time" in render_card(record_of(model), tmp_path / "README.md")


def test_licence_comes_from_a_licence_file_where_no_card_names_it(model, tmp_path):
    record = record_of(model) | {"files": {"LICENSE": "00"}}
    for words, licence in (("Apache License\n  Version 2.0, January 2004", "apache-2.0"), ("Own words", "other")):
        (tmp_path / "LICENSE").write_text(words)
        data = ModelCard(render_card(record, tmp_path / "README.md")).data
        assert data.license == licence
    assert data.license_link == "LICENSE"


def test_card_says_when_nothing_was_checked_or_approximated(model):
    text = render_card(record_of(model, layers={}, plan=plan_for(model, 8)))
    assert "--no-verify" in text and "No layer was approximated" in text


def test_licence_comes_from_the_source(model, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: llama2\nlanguage: [en, no]\ntags: [chat]\n---\n# Parent\n")
    data = ModelCard(render_card(record_of(model), card)).data.to_dict()
    assert (data["license"], data["license_name"], data["language"]) == ("other", "llama2", ["en", "no"])
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
    inserted = with_section(CARD, "Evaluation", "Better.", before="Errors")
    assert inserted == CARD.replace("## Errors", "## Evaluation\n\nBetter.\n\n## Errors")
    assert with_section(inserted, "Evaluation", "Worse.", before="Command") == inserted.replace("Better", "Worse")


def test_a_fence_hides_headings():
    assert with_section(CARD, "not a heading", "x") == CARD + "\n## not a heading\n\nx\n"
    assert with_section(CARD, "Command", "x").endswith("None.\n\n## Command\n\nx\n")
    assert with_section("", "A", "x") == "## A\n\nx\n"
