"""Documents to rows of tokens, and rows to batches in which no document sees another.

Stock transformers keeps packed documents apart by their position ids: where these start anew, so does attention
(`create_causal_mask` for eager, sdpa and flex; the cumulative lengths of flash attention). Nothing here builds a
mask.
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

from headwise.errors import HeadwiseError


def end_of_text(tokenizer: Any) -> int:
    """The token that closes a document.

    Raises:
        HeadwiseError: the tokenizer has none.
    """
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    end = next((token for token in ends if token is not None), None)
    if end is None:
        raise HeadwiseError("The tokenizer has no end-of-text token to put between documents.")
    return end


def beginning_of_text(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def encode(texts: Iterable[str], tokenizer: Any, batch: int = 1024) -> Iterator[np.ndarray]:
    """Each text's tokens and an end-of-text token after them, int32; `batch` texts go to the tokenizer at once."""
    end = end_of_text(tokenizer)
    texts = iter(texts)
    while chunk := list(islice(texts, batch)):
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        for tokens in tokenizer(chunk, **options)["input_ids"]:
            yield np.array([*tokens, end], dtype=np.int32)


def pack(encoded: Iterable[np.ndarray], length: int, begin: int | None = None) -> Tensor:
    """Documents one after another, cut where a row is full: int32 (rows, length); an unfilled last row is dropped.

    `begin` is put before each document and before each row.
    """
    opening = np.zeros(0, dtype=np.int32) if begin is None else np.array([begin], dtype=np.int32)
    pieces, room = [opening], length - len(opening)
    for document in encoded:
        if room < length - len(opening):
            pieces.append(opening[:room])
            room -= len(opening[:room])
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
    """Rows to what a causal language model is trained on.

    Every token predicts the next one of its document: `labels` are -100 where a document or row begins. Losses
    that are not cross-entropy read from them which positions count.
    """

    end: int | None
    """The token that closes a document; None: a row is one text, whatever is in it."""
    flat: bool = False
    """All rows as one, (1, rows * length), which is how flash attention wants packed documents."""

    def __call__(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """Rows (length,) to input_ids, labels and position_ids, int64 (rows, length)."""
        tokens = torch.stack(rows).long()
        first = torch.zeros_like(tokens, dtype=torch.bool)
        first[:, 0] = True
        if self.end is None:
            return {"input_ids": tokens, "labels": tokens.masked_fill(first, -100)}
        first[:, 1:] = tokens[:, :-1] == self.end
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        batch = {
            "input_ids": tokens,
            "labels": tokens.masked_fill(first, -100),
            "position_ids": places - places.where(first, 0).cummax(1).values,
        }
        return {name: value.reshape(1, -1) for name, value in batch.items()} if self.flat else batch


def collator(model: Any, tokenizer: Any, separate_documents: bool = True) -> Collator:
    """The collator for a stock model, by what its attention understands.

    Raises:
        HeadwiseError: the model's class cannot keep documents apart.
    """
    if not separate_documents:
        return Collator(None)
    if not keeps_documents_apart(model):
        raise HeadwiseError(
            f"{type(model).__name__} lets documents that share a block see each other.",
            "Pass --set data.separate_documents=false.",
        )
    return Collator(end_of_text(tokenizer), flat="flash" in (model.config._attn_implementation or ""))


@torch.no_grad()
def keeps_documents_apart(model: Any) -> bool:
    """Whether a document's logits are the same whatever was before it in the row; a few stock classes leak.

    A model without weights yet (on the meta device) is taken at its word.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if model.device.type == "meta":
        return True
    was_training = model.training
    model.eval()
    places = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device)
    logits = [
        model(input_ids=torch.tensor([row]).to(places), position_ids=places, use_cache=False).logits[:, 3:]
        for row in ([3, 4, 5, 6, 7, 8], [6, 7, 8, 6, 7, 8])
    ]
    model.train(was_training)
    # Said so that weights without meaning (a process that is yet to get its own) do not count as a leak.
    return not bool((logits[0] - logits[1]).abs().max() > 0.01 * logits[0].abs().max())
