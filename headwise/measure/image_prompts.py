"""Read image-text pairs, and prepare them with the stock processor of a vision-language model."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError, SettingError, is_out_of_memory
from headwise.io.tokenizer import tokenizer_errors
from headwise.models.protocol import context_length, reads_pairs
from headwise.models.stock import stock_config

VISION_CLASS = "AutoModelForImageTextToText"
FIELDS = ("image", "text")
INSTALL = "pip install 'headwise[images]'"
# A private-use character, which no template holds and none strips.
MARK = "\ue000"


@dataclass(frozen=True)
class ImagePair:
    """An image and the text that belongs to it.

    Attributes:
        place: file and line, for messages.
        image: path of the image.
        text: with or without the model's placeholder of the image.
    """

    place: str
    image: Path
    text: str


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt with an image, as a model gets it.

    Attributes:
        inputs: the arguments of the stock model, one row each.
        visual: bool (tokens,), true where a token holds a part of the image, or ends a row of it and the processor
            lists it.
        text: bool (tokens,), true where a token belongs to the text of the pair. These tokens are behind the image.
            The other ones are the template's.
    """

    inputs: dict[str, Tensor]
    visual: Tensor
    text: Tensor

    @property
    def tokens(self) -> Tensor:
        """Return the token ids, (1, tokens)."""
        return self.inputs["input_ids"]

    def model_inputs(self, model: Any) -> dict[str, Tensor]:
        """Return the arguments on the device of a model, numbers of the image in its precision.

        Args:
            model: a stock model.
        """
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in self.inputs.items()
        }


def read_image_pairs(path: Path, field: str = "images") -> list[ImagePair]:
    """Read the image-text pairs of a file, and check that every image can be read.

    Args:
        path: a `.jsonl` file with the keys "image" and "text" in every line; images are relative to its folder.
        field: the setting that names it.

    Raises:
        SettingError: there is no such file, or it holds fewer than two pairs.
        HeadwiseError: a line is no pair, or an image cannot be read.
    """
    pillow = _pillow()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError(
            field, f"{path} cannot be read: {reason}.", f"`{field}` names a .jsonl file of image-text pairs."
        ) from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
        except ValueError:
            row = None
        image, text = (row.get(key) if isinstance(row, dict) else None for key in FIELDS)
        if not (isinstance(image, str) and isinstance(text, str) and image and text):
            raise HeadwiseError(
                f"{place}, is no image-text pair.", 'Each line needs the path of an "image" and a "text".'
            )
        pair = ImagePair(place, path.parent / image, text)
        with _image_errors(pair), pillow.open(pair.image) as opened:
            opened.load()  # `verify` reads no pixels
        pairs.append(pair)
    if len(pairs) < 2:
        raise SettingError(field, f"{path} holds {len(pairs)} image-text pairs, and two are needed.")
    return pairs


class ImagePrompts:
    """The prompts of image-text pairs, made one at a time by the stock processor of a folder.

    A text with the processor's placeholder of an image is taken as it is. Any other text becomes the answer to the
    image in the chat template, or follows the image where the folder has no template. Reading a prompt checks it:
    read all of them before any output starts.

    Args:
        pairs: the pairs.
        folder: of the model, with the files of its processor.
        source: the user's name of the model.
        config: its config.json.

    Raises:
        HeadwiseError: the folder has no processor that transformers can load.
    """

    def __init__(self, pairs: list[ImagePair], folder: str | Path, source: str, config: dict[str, Any]) -> None:
        from transformers import AutoProcessor, ProcessorMixin

        self._pairs, self._source = pairs, source
        self._context = context_length(config)
        stock = stock_config(config)
        visual = [getattr(stock, name, None) for name in ("image_token_id", "image_token_index")]
        hint = "Add the processor's files (such as processor_config.json) to the folder."
        complaint = f"{source} has no processor of images that transformers can load"
        with tokenizer_errors(complaint, hint):
            try:
                processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            except ImportError as error:  # of torchvision, by some processors
                raise HeadwiseError(f"{complaint}: {str(error).strip().split('. ')[0]}.", INSTALL) from error
        if not isinstance(processor, ProcessorMixin):  # without the files it is the tokenizer alone
            raise HeadwiseError(f"{complaint}.", hint)
        self._processor: Any = processor
        # Some processors also mark the ends of rows and of the image, as Pixtral's.
        visual += getattr(processor, "image_token_ids", None) or []
        self._visual = torch.tensor(sorted({each for each in visual if each is not None}), dtype=torch.long)

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[ImagePrompt]:
        return map(self._prompt, self._pairs)

    def __getitem__(self, number: int) -> ImagePrompt:
        return self._prompt(self._pairs[number])

    def content_hash(self) -> str:
        """Compute the SHA-256 of all images and texts."""
        total = hashlib.sha256()
        for pair in self._pairs:
            for content in (pair.image.read_bytes(), pair.text.encode()):
                total.update(hashlib.sha256(content).digest())
        return total.hexdigest()

    def _prompt(self, pair: ImagePair) -> ImagePrompt:
        with _image_errors(pair), _pillow().open(pair.image) as opened:
            image = opened.convert("RGB")
        with tokenizer_errors(f"The processor of {self._source} fails on {pair.place}", "Leave out this pair."):
            given, text, after = self._encode(image, pair)
            ids = given["input_ids"][0]
        visual = torch.isin(ids, self._visual)
        if not visual.any():
            raise HeadwiseError(
                f"The processor of {self._source} puts no image into the prompt of {pair.place}.",
                "Put the model's placeholder of an image into the text.",
            )
        if self._context is not None and len(ids) > self._context:
            raise HeadwiseError(
                f"{pair.place}: the prompt has {len(ids):,} tokens, and the context of {self._source} is "
                f"{self._context:,}.",
                "Give a shorter text or a smaller image.",
            )
        start = int(visual.nonzero()[-1]) + 1
        chosen = torch.zeros_like(visual)
        chosen[start:] = self._span(ids[start:], text, after)
        if not chosen.any():
            raise HeadwiseError(
                f"{pair.place}: no text follows the image.", "Put the image's placeholder before the text."
            )
        return ImagePrompt({name: torch.as_tensor(value) for name, value in given.items()}, visual, chosen)

    def _encode(self, image: Any, pair: ImagePair) -> tuple[Any, str, str]:
        """Return the arguments of the model, the text behind the image, and what the template adds behind that."""
        processor, text = self._processor, pair.text
        placeholder = str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or "")
        count = text.count(placeholder) if placeholder else 0
        if count > 1:
            raise HeadwiseError(
                f"{pair.place}: the text has {count} placeholders {placeholder}, and a pair has one image.",
                "Keep one of them.",
            )
        if count == 0 and getattr(processor, "chat_template", None):

            def chat(answer: str, **options: Any) -> Any:
                conversation = [
                    {"role": "user", "content": [{"type": "image", "image": image}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ]
                return processor.apply_chat_template(conversation, **options)

            after = chat(MARK, tokenize=False).rpartition(MARK)[2]
            return chat(text, tokenize=True, return_dict=True, return_tensors="pt"), text, after
        whole = text if count else placeholder + text
        return (
            processor(images=image, text=whole, return_tensors="pt"),
            whole.rpartition(placeholder or MARK)[2],
            "",
        )

    def _span(self, ids: Tensor, text: str, after: str) -> Tensor:
        """Return which of the tokens behind an image hold a part of a text, bool (tokens,).

        All of them do where the tokenizer does not give the text back, as one that changes letters.

        Args:
            ids: token ids behind the image, (tokens,).
            text: the text, which a template may strip.
            after: what follows it in the template.
        """
        rows = ids.tolist()
        span = torch.zeros(len(rows), dtype=torch.bool)
        bare = text.strip()
        if not bare:
            return span

        def decoded(count: int) -> str:
            return str(
                self._processor.tokenizer.decode(
                    rows[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )

        whole = decoded(len(rows))
        for answer, rest in ((text, after), (bare, after), (bare, "")):
            if (start := whole.rfind(answer + rest)) >= 0:
                until = whole[: start + len(answer)]
                first = bisect_right(range(len(rows)), start, key=lambda i: len(decoded(i + 1)))
                # By content: the first bytes of a character are already as long as the character.
                last = bisect_left(range(len(rows)), True, key=lambda i: decoded(i).startswith(until))
                span[first:last] = True
                # A raw text may begin with the mark behind an image.
                return span & ~torch.isin(ids, torch.tensor(self._processor.tokenizer.all_special_ids))
        return ~span


def open_prompts(
    path: Path, auto_class: str, folder: str | Path, source: str, config: dict[str, Any]
) -> ImagePrompts:
    """Return the prompts of a file of image-text pairs.

    Args:
        path: the file.
        auto_class: name of the transformers class that loads the model.
        folder: of the model, with the files of its processor.
        source: the user's name of the model.
        config: its config.json.

    Raises:
        SettingError: the model reads no images or is an encoder-decoder, or there is no such file.
        HeadwiseError: a line is no pair, an image cannot be read, or the folder has no processor.
    """
    if auto_class != VISION_CLASS:
        why = (
            "is an encoder-decoder, which headwise runs on text alone" if reads_pairs(config) else "reads no images"
        )
        raise SettingError(
            "images",
            f"`images` is for vision-language models, and {source} {why}.",
            "Leave out `images`.",
        )
    return ImagePrompts(read_image_pairs(path), folder, source, config)


def _pillow() -> Any:
    """Return the module that opens images."""
    try:
        from PIL import Image
    except ImportError:
        raise HeadwiseError("Reading images needs Pillow, which is not installed.", INSTALL) from None
    return Image


@contextmanager
def _image_errors(pair: ImagePair) -> Iterator[None]:
    """Turn any failure of the image library into a sentence."""
    try:
        yield
    except Exception as error:  # damaged files of some formats raise SyntaxError, ValueError or struct.error
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or "it is no image, or it is damaged"
        raise HeadwiseError(f"{pair.place}: {pair.image} cannot be read: {reason}.") from error
