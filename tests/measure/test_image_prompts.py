"""Image-text pairs, and the prompts that a stock processor makes of them."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer

from headwise.errors import HeadwiseError, SettingError
from headwise.measure.image_prompts import ImagePrompt, ImagePrompts, open_prompts, read_image_pairs
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
        assert torch.equal(prompt.text, ~prompt.visual)
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


def text_of(model: Path, prompt: ImagePrompt) -> str:
    """Return what the tokens of the text say."""
    return str(AutoTokenizer.from_pretrained(model).decode(prompt.tokens[0][prompt.text]))


@pytest.mark.parametrize(
    "end", ["", "{% for m in messages %}{% if loop.last %}a noise 🦊 end\n{% endif %}{% endfor %}"]
)
@pytest.mark.parametrize("text", ["a", "assistant", "noise 测🦊", " a noise  ", "end", "a noise 🦊 end"])
def test_only_the_answer_of_a_template_is_text(model: Path, pairs: Path, text: str, end: str) -> None:
    (model / "chat_template.jinja").write_text("system: a noise\n" + TEMPLATE + end)
    pairs.write_text(f"{json.dumps({'image': '0.png', 'text': text})}\n" * 2)
    prompt = prompts_of(model, pairs)[0]
    found = text_of(model, prompt)
    # A token can hold a letter of the template too.
    assert text in found and len(found) <= len(text) + 2
    assert int(prompt.text.sum()) < int((~prompt.visual).sum()) - 4
    stripped = (model / "chat_template.jinja").read_text().replace("c.text", "c.text | trim")
    (model / "chat_template.jinja").write_text(stripped)
    found = text_of(model, prompts_of(model, pairs)[0])
    assert text.strip() in found and len(found) <= len(text.strip()) + 2


def test_a_text_that_the_tokenizer_changes_begins_behind_the_image(model: Path, pairs: Path) -> None:
    fields = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(fields | {"normalizer": {"type": "Lowercase"}}))
    (model / "chat_template.jinja").write_text("system: a noise\n" + TEMPLATE)
    pairs.write_text(f"{json.dumps({'image': '0.png', 'text': 'NOISE'})}\n" * 2)
    prompt = prompts_of(model, pairs)[0]
    behind = int(prompt.visual.nonzero()[-1]) + 1
    assert prompt.text[behind:].all() and not prompt.text[:behind].any()


def test_ends_of_rows_belong_to_the_image(model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG_BREAK]", "[IMG_END]"]})
    tokenizer.save_pretrained(model)
    ends = tokenizer.convert_tokens_to_ids(["[IMG_BREAK]", "[IMG_END]"])
    written = "<image><image>[IMG_BREAK]<image><image>[IMG_END]"
    monkeypatch.setattr(transformers.LlavaProcessor, "replace_image_token", lambda *_, **__: written)
    before = prompts_of(model, pairs)[0]
    assert int(before.visual.sum()) == 4
    listed = property(lambda self: [self.image_token_id, *ends])  # as Pixtral's, which needs torchvision
    monkeypatch.setattr(transformers.LlavaProcessor, "image_token_ids", listed)
    prompt = prompts_of(model, pairs)[0]
    assert prompt.visual[:6].all() and not prompt.visual[6:].any()
    assert torch.equal(prompt.text, ~prompt.visual)


def damaged(pairs: Path) -> None:
    (pairs.parent / "1.png").write_bytes((pairs.parent / "1.png").read_bytes()[:60])


def truncated(pairs: Path) -> None:
    """Write a JPEG whose header is whole."""
    content = BytesIO()
    Image.effect_noise((64, 64), 90).save(content, "JPEG")
    (pairs.parent / "1.png").write_bytes(content.getvalue()[: len(content.getvalue()) // 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "line 2: .*1.png cannot be read: it is no image, or it is damaged"),
        (truncated, "line 2: .*1.png cannot be read: it is no image, or it is damaged"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("word " * 600, r"line 2: the prompt has [\d,]+ tokens, and the context of model is 128\."),
        ("<image> and <image>", "line 2: the text has 2 placeholders <image>"),
        ("what is <image>", "line 2: no text follows the image"),
    ],
)
def test_a_prompt_that_the_model_cannot_get_is_named(model: Path, pairs: Path, text: str, message: str) -> None:
    row = json.dumps({"image": "0.png", "text": text})
    pairs.write_text(pairs.read_text().split("\n")[0] + f"\n{row}\n")
    with pytest.raises(HeadwiseError, match=message):
        list(prompts_of(model, pairs))


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
