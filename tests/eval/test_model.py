"""The models of an evaluation: their identity by content, and equal tokenizers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from headwise.errors import HeadwiseError
from headwise.eval.model import find_model, same_tokenizer
from tests.convert.speaking import save_speaking


def test_the_content_hash_covers_weights_config_and_tokenizer(tmp_path: Path) -> None:
    parent = save_speaking(tmp_path / "parent", max_position_embeddings=128)
    copy = tmp_path / "copy"
    shutil.copytree(parent, copy)
    before = find_model(parent).subject.sha256
    assert find_model(copy).subject.sha256 == before
    (copy / "README.md").write_text("A model card.")
    assert find_model(copy).subject.sha256 == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 9.0}))
    assert find_model(copy).subject.sha256 != before
    shutil.copy(parent / "config.json", copy)
    assert find_model(copy).subject.sha256 == before
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer + " ")
    assert find_model(copy).subject.sha256 != before
    (copy / "tokenizer.json").write_text(tokenizer)
    changed = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    changed.save_pretrained(copy)
    assert find_model(copy).subject.sha256 != before


def test_sizes_are_those_of_the_stock_class(tmp_path: Path) -> None:
    folder = save_speaking(tmp_path / "parent", max_position_embeddings=2048)
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]  # the default of the class is 2048
    (folder / "config.json").write_text(json.dumps(config))
    model = find_model(folder)
    assert model.context == 2048 and model.vocabulary == 257
    unknown = replace(model, source=replace(model.source, config={"model_type": "own", "vocab_size": 257}))
    assert unknown.context is None and unknown.vocabulary is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "T5ForConditionalGeneration is an encoder-decoder model",
        ),
        (
            {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            "ViTForImageClassification is no language model",
        ),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, object], words: str) -> None:
    save_speaking(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadwiseError, match=f"cannot be evaluated: {words}"):
        find_model(tmp_path)


def test_a_swapped_vocabulary_is_another_tokenizer(tmp_path: Path) -> None:
    parent = save_speaking(tmp_path / "parent")
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    ours, theirs = find_model(parent).load_tokenizer(), find_model(other).load_tokenizer()
    assert same_tokenizer(ours, theirs)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert not same_tokenizer(ours, find_model(other).load_tokenizer())
