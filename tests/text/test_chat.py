"""Conversations: rendered by the chat template, and only the answers are predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from headwise.errors import HeadwiseError
from headwise.io.source import EMBEDDED_MODEL
from headwise.text.blocks import blocks_from, training_blocks
from headwise.text.chat import Chat, encode_chat, read_chat
from headwise.text.marks import GIVEN, tokens_of
from headwise.text.packing import Collator, encode, pack
from headwise.text.sources import Data, documents

PLAIN = "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}<end>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}[assistant]\n{% endif %}"
TAGGED = (
    "{% for m in messages %}[{{ m['role'] }}]\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}<end>{% endif %}\n"
    "{% endfor %}"
)
# Like templates that drop the reasoning of earlier answers.
CHANGES = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] if loop.last else 'cut' }}<end>\n{% endfor %}"
    + PROMPT
)
TURNS = [
    {"role": "user", "content": "Why is x = 2?"},
    {"role": "assistant", "content": "return None"},
    {"role": "user", "content": "é 漢 and then"},
    {"role": "assistant", "content": "import os"},
]


def tokenizer(template: str | None) -> Any:
    loaded = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    loaded.chat_template = template
    return loaded


@pytest.mark.parametrize("template", [PLAIN + PROMPT, TAGGED + PROMPT])
def test_only_answers_are_predicted(template: str) -> None:
    loaded = tokenizer(template)
    tokens = np.array(encode_chat(read_chat(TURNS, "chat"), loaded))
    assert loaded.decode(tokens & (GIVEN - 1)) == loaded.apply_chat_template(TURNS, tokenize=False)
    predicted = loaded.decode(tokens[tokens & GIVEN == 0])
    assert predicted == "return None<end>import os<end>"


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        (None, TURNS, "chat, line 3 is a conversation, and the model has no chat template"),
        (CHANGES, TURNS, "chat, line 3: the chat template changes earlier turns, so that answer 1 cannot"),
        ("{{ raise_exception('Roles must alternate.') }}", TURNS, "refuses the conversation: Roles must alternate"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(template: Any, messages: Any, sentence: str) -> None:
    with pytest.raises(HeadwiseError, match=sentence):
        encode_chat(Chat(tuple(messages), "chat, line 3"), tokenizer(template))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": []}, "line 2: `messages` is not a list of messages"),
        ({"messages": "hello"}, "line 2: `messages` is not a list of messages"),
        ({"messages": [*TURNS, {"role": "user"}]}, "line 2: message 5 has no `content`"),
        ({"messages": [{"content": "a"}]}, "line 2: message 1 has no `role`"),
        ({"messages": ["a"]}, "line 2: message 1 has no `role`"),
        ({"turns": []}, 'line 2, is not a JSON object with a "text" or "messages"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, sentence: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(HeadwiseError, match=sentence) as refused:
        documents(str(path))
    assert str(path) in str(refused.value)


def test_conversations_and_texts_share_a_file_and_its_blocks(tmp_path: Path) -> None:
    loaded = tokenizer(PLAIN + PROMPT)
    path = tmp_path / "mixed.jsonl"
    rows = [{"messages": TURNS}, {"text": "def f(): pass"}] * 7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks, facts = training_blocks(Data({str(path): 1}, length=19), loaded, 10**6)
    assert facts[str(path)]["documents"] == 14
    batch = Collator(True)(list(blocks))
    given = (blocks & GIVEN) != 0
    assert given.any() and bool((batch["labels"][given] == -100).all())
    assert int(batch["input_ids"].max()) < len(loaded)
    # The turns of a conversation are one document: positions count on through its end tokens.
    chat = encode_chat(read_chat(TURNS, "chat"), loaded)
    assert int(batch["position_ids"].max()) == min(19, len(chat)) - 1
    read = blocks_from(str(path), loaded, length=19, count=3)
    assert int(read.max()) < len(loaded)
    marked = blocks_from(str(path), loaded, length=19, count=3, marked=True)
    assert torch.equal(tokens_of(marked), read) and bool((marked & GIVEN).any())


def test_a_template_with_a_bos_token_does_not_begin_twice() -> None:
    loaded = tokenizer(PLAIN)
    bos = loaded.eos_token_id

    class WithBos:
        """A tokenizer that puts a BOS token before every text, as its template does."""

        bos_token_id = eos_token_id = bos
        sep_token_id, is_fast, chat_template = None, True, PLAIN

        def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> Any:
            encoded = loaded(text, add_special_tokens=False, **options)
            return {"input_ids": [bos, *encoded["input_ids"]]} if add_special_tokens else encoded

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return f"{loaded.eos_token}{messages[0]['content']}"

    (tokens,) = encode([Chat(({"role": "user", "content": "xy"},), "chat")], WithBos())
    rows = tokens_of(pack([tokens, np.array([7, 8, 9], dtype=np.int32)], 3, begin=bos))
    assert rows.flatten().tolist().count(bos) == 2 and rows[0, 0] == bos
