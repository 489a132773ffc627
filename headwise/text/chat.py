"""Render conversations by a model's own chat template, with the answers marked as the tokens that are predicted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.errors import HeadwiseError
from headwise.text.marks import GIVEN

# A template with these tags marks its own answers (transformers' `return_assistant_tokens_mask`).
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    """A conversation: one document of a text source.

    Attributes:
        messages: mappings with a `role` and a `content`, both texts.
        where: the file and line, for error messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str

    def __len__(self) -> int:
        """Return the number of characters of all messages."""
        return sum(len(message["content"]) for message in self.messages)


def read_chat(messages: Any, where: str) -> Chat:
    """Check a `messages` list.

    Args:
        messages: the value of the row.
        where: the file and line, for error messages.

    Raises:
        HeadwiseError: it is not a list, is empty, or a message lacks its `role` or `content`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise HeadwiseError(
            f"{where}: `messages` is not a list of messages.", 'Give [{"role": ..., "content": ...}].'
        )
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise HeadwiseError(
                    f"{where}: message {number} has no `{key}` that is a text.", "Add it to the line."
                )
    return Chat(tuple(messages), where)


def encode_chat(chat: Chat, tokenizer: Any) -> list[int]:
    """Return the tokens of a conversation; every token outside the answers has the mark GIVEN.

    Args:
        chat: the conversation.
        tokenizer: a stock tokenizer with a chat template.

    Raises:
        HeadwiseError: there is no chat template, it refuses the conversation, or its answers cannot be located.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise HeadwiseError(
            f"{chat.where} is a conversation, and the model has no chat template.",
            'Add chat_template.jinja to the model, or give lines with a "text".',
        )
    if isinstance(template, str) and _MARKS_ANSWERS.search(template):
        tokens, predicted = _by_tags(chat, tokenizer)
    else:
        tokens, predicted = _by_prefixes(chat, tokenizer)
    return [token if answer else token | GIVEN for token, answer in zip(tokens, predicted, strict=True)]


def _by_tags(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    rendered = _render(
        chat, tokenizer, len(chat.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return rendered["input_ids"], [bool(mask) for mask in rendered["assistant_masks"]]


def _by_prefixes(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Locate each answer between the rendering before it and the rendering up to it."""
    whole = _render(chat, tokenizer, len(chat.messages))
    answers: list[tuple[int, int]] = []
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _render(chat, tokenizer, index, add_generation_prompt=True)
        through = _render(chat, tokenizer, index + 1).rstrip()
        if not whole.startswith(before) or not whole.startswith(through) or len(through) < len(before):
            raise HeadwiseError(
                f"{chat.where}: the chat template changes earlier turns, so that answer {len(answers) + 1} cannot "
                "be located.",
                "Give each answer a conversation of its own, or use a template with generation tags.",
            )
        answers.append((len(before), len(through)))
    if not tokenizer.is_fast:
        raise HeadwiseError(
            f"{chat.where}: the model's tokenizer gives no offsets, so that answers cannot be located.",
            'Give lines with a "text".',
        )
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [any(a <= start < b for a, b in answers) for start in starts]


def _render(chat: Chat, tokenizer: Any, count: int, **options: Any) -> Any:
    """Return the rendering of the first messages."""
    try:
        return tokenizer.apply_chat_template(list(chat.messages[:count]), **{"tokenize": False, **options})
    except Exception as error:  # a template may refuse a conversation, with any error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise HeadwiseError(
            f"{chat.where}: the model's chat template refuses the conversation: {reason}.",
            "Give conversations in the form that the template supports.",
        ) from error
