"""Image-text pairs, and the prompts that a stock processor makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from headwise.errors import HeadwiseError, SettingError
from headwise.measure.image_prompts import ImagePrompts, open_prompts, read_image_pairs
from tests import small_parents, tiny_models

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_parents.seeing_parent(tmp_path / "model")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return small_parents.image_pairs(tmp_path / "pairs", 4)


def prompts_of(model: Path, pairs: Path) -> ImagePrompts:
    return open_prompts(pairs, "AutoModelForImageTextToText", model, "model", tiny_models.read_config(model))


def test_an_image_becomes_tokens_before_its_text(model: Path, pairs: Path) -> None:
    prompts = prompts_of(model, pairs)
    assert len(prompts) == 4
    for prompt in prompts:
        assert prompt.visual[:4].all() and not prompt.visual[4:].any()
        assert prompt.inputs["pixel_values"].shape == (1, 3, 8, 8)
    assert len({prompt.tokens.shape[1] for prompt in prompts}) > 1
    assert torch.equal(prompts[2].tokens, list(prompts)[2].tokens)


def test_a_text_with_a_placeholder_keeps_its_place(model: Path, pairs: Path) -> None:
    row = {"image": "0.png", "text": "what is this <image> ?"}
    pairs.write_text(f"{json.dumps(row)}\n" * 2)
    prompt = prompts_of(model, pairs)[0]
    assert not prompt.visual[0] and int(prompt.visual.sum()) == 4 and not prompt.visual[-1]


def test_a_chat_template_places_image_and_answer(model: Path, pairs: Path) -> None:
    before = prompts_of(model, pairs)[0].tokens.shape[1]
    (model / "chat_template.jinja").write_text(TEMPLATE)
    prompt = prompts_of(model, pairs)[0]
    assert int(prompt.visual.sum()) == 4 and not prompt.visual[0]
    assert prompt.tokens.shape[1] > before


def damaged(pairs: Path) -> None:
    (pairs.parent / "1.png").write_bytes((pairs.parent / "1.png").read_bytes()[:60])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "line 2: .*1.png cannot be read: it is no image, or it is damaged"),
        (lambda pairs: (pairs.parent / "1.png").unlink(), "line 2: .*1.png cannot be read: No such file"),
        (lambda pairs: pairs.write_text('{"image": "0.png"}\n'), "line 1, is no image-text pair"),
        (lambda pairs: pairs.write_text(pairs.read_text().split("\n")[0]), "holds 1 image-text pairs"),
        (lambda pairs: pairs.unlink(), "pairs.jsonl cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(pairs: Path, change, message: str) -> None:
    change(pairs)
    with pytest.raises(HeadwiseError, match=message):
        read_image_pairs(pairs)


def test_a_folder_without_a_processor_is_refused(model: Path, pairs: Path) -> None:
    (model / "processor_config.json").unlink()
    with pytest.raises(HeadwiseError, match="has no processor of images"):
        prompts_of(model, pairs)


def test_a_missing_package_is_named(model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ImportError("\nThisProcessor requires the Torchvision library. Check out\nthe page")

    with monkeypatch.context() as patched, pytest.raises(HeadwiseError, match="requires the Torchvision") as caught:
        patched.setattr("transformers.AutoProcessor.from_pretrained", fails)
        prompts_of(model, pairs)
    assert caught.value.hint == "pip install 'headwise[images]'"
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(HeadwiseError, match="needs Pillow, which is not installed"):
        read_image_pairs(pairs)


def test_a_model_of_text_is_refused(pairs: Path, tmp_path: Path) -> None:
    folder = small_parents.parent(tmp_path / "text")
    with pytest.raises(SettingError, match="reads no images"):
        open_prompts(pairs, "AutoModelForCausalLM", folder, "text", tiny_models.read_config(folder))
    both = tiny_models.config_of("t5gemma2")  # its encoder reads images, and headwise gives it none
    with pytest.raises(SettingError, match="both is an encoder-decoder, which headwise runs on text alone"):
        open_prompts(pairs, "AutoModelForSeq2SeqLM", folder, "both", both)
