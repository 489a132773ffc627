"""Pack documents into rows of tokens, and rows into batches that mask attention between documents.

Stock transformers separates packed documents by their position ids: attention starts anew where they do
(`create_causal_mask` for eager, sdpa and flex; the cumulative lengths of flash attention). No mask is built here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.errors import HeadwiseError, SettingError
from headwise.text.chat import Chat, encode_chat
from headwise.text.marks import BEGINS, GIVEN, begins, given_tokens, tokens_of


def end_of_text(tokenizer: Any) -> int:
    """Return the token that ends a document.

    Args:
        tokenizer: a stock tokenizer.

    Raises:
        HeadwiseError: the tokenizer has none.
    """
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    end: int | None = next((token for token in ends if token is not None), None)
    if end is None:
        raise HeadwiseError("The tokenizer has no end-of-text token to put between documents.")
    return end


def beginning_of_text(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer puts before every text, or None.

    Args:
        tokenizer: a stock tokenizer.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def encode(texts: Iterable[str | Chat], tokenizer: Any, batch: int = 1024) -> Iterator[np.ndarray]:
    """Yield each text's tokens and an end-of-text token, int32. A chat template ends a conversation in its own way.

    Args:
        texts: the documents.
        tokenizer: a stock tokenizer.
        batch: texts in one call of the tokenizer.
    """
    end, begin = end_of_text(tokenizer), beginning_of_text(tokenizer)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    texts = iter(texts)
    while chunk := list(islice(texts, batch)):
        plain = [text for text in chunk if isinstance(text, str)]
        encoded = iter(tokenizer(plain, **options)["input_ids"] if plain else ())
        for text in chunk:
            if isinstance(text, str):
                yield np.array([*next(encoded), end], dtype=np.int32)
            elif tokens := encode_chat(text, tokenizer):
                # `pack` opens every document with the BOS token, which many templates render too.
                twice = begin is not None and tokens[0] == begin | GIVEN
                yield np.array(tokens[twice:], dtype=np.int32)


def pack(encoded: Iterable[np.ndarray], length: int, begin: int | None = None) -> Tensor:
    """Pack documents one after another, cut where a row is full.

    Args:
        encoded: tokens of the documents.
        length: tokens of a row.
        begin: token that is put before each document and before each row.

    Returns:
        int32 (rows, length) with the marks of `headwise.text.marks`; an unfilled last row is dropped.
    """
    opening = np.zeros(0, dtype=np.int32) if begin is None else np.array([begin], dtype=np.int32)
    pieces, room = [opening], length - len(opening)
    for document in encoded:
        if room < length - len(opening):
            pieces.append(opening[:room] | BEGINS)
            room -= len(opening[:room])
            if not len(opening):
                document = document.copy()
                document[0] |= BEGINS
        while len(document) > room:
            pieces += [document[:room], opening]
            document, room = document[room:], length - len(opening)
        pieces.append(document)
        room -= len(document)
        if room == 0:
            pieces.append(opening)
            room = length - len(opening)
    stream = np.concatenate(pieces)
    return torch.from_numpy(stream[: len(stream) // length * length].reshape(-1, length))


@dataclass(frozen=True)
class Collator:
    """Turn rows into batches for a causal language model.

    Every token predicts the next one of its document: `labels` are -100 where a document or row begins, and at the
    questions of a conversation. Losses other than cross-entropy take from the labels which positions count.

    Attributes:
        separate_documents: start each document that shares a row at position 0; otherwise a row is one text.
        flat: all rows as one, (1, rows * length), the form in which flash attention separates documents: what
            transformers' `DataCollatorWithFlattening` makes of the documents.
    """

    separate_documents: bool
    flat: bool = False

    def __call__(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """Return the batch of some rows.

        Args:
            rows: (length,) each, as `pack` returns them.

        Returns:
            input_ids, labels and, where documents are separated, position_ids: int64 (rows, length).
        """
        marked = torch.stack(rows).long()
        tokens, is_first = tokens_of(marked), begins(marked)
        if not self.separate_documents:
            is_first[:, 1:] = False
            return {"input_ids": tokens, "labels": tokens.masked_fill(is_first | given_tokens(marked), -100)}
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        batch = {
            "input_ids": tokens,
            "labels": tokens.masked_fill(is_first | given_tokens(marked), -100),
            "position_ids": positions - positions.where(is_first, 0).cummax(1).values,
        }
        return {name: value.reshape(1, -1) for name, value in batch.items()} if self.flat else batch


def collator(model: Any, separate_documents: bool = True) -> Collator:
    """Return the collator for a stock model.

    Args:
        model: a stock model; its attention implementation decides the form of the batch.
        separate_documents: mask attention between documents that share a row.

    Raises:
        SettingError: the model's class cannot mask attention between documents.
    """
    if not separate_documents:
        return Collator(False)
    if not separates_documents(model):
        raise SettingError(
            "data.separate_documents",
            f"{type(model).__name__} does not mask attention between documents that share a block.",
            "Give data.separate_documents=false.",
        )
    return Collator(True, flat="flash" in (model.config._attn_implementation or ""))


@torch.no_grad()
def separates_documents(model: Any) -> bool:
    """Return whether a document's logits are independent of the document before it; a few stock classes leak.

    Args:
        model: a stock model. On the meta device, without weights, its signature alone decides.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if model.device.type == "meta":
        return True
    was_training = model.training
    model.eval()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device)
    logits = [
        model(input_ids=torch.tensor([row]).to(positions), position_ids=positions, use_cache=False).logits[:, 3:]
        for row in ([3, 4, 5, 6, 7, 8], [6, 7, 8, 6, 7, 8])
    ]
    model.train(was_training)
    # In this form NaN does not count as a leak: a process may not have its weights yet.
    return not bool((logits[0] - logits[1]).abs().max() > 0.01 * logits[0].abs().max())
