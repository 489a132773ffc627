"""Measure in memory what sliding windows cost a model: its attention masks are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.measure.loss import TextLoss, token_nats


def window_mask(length: int, window: int, first: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a mask that is added to scores: 0 where a query attends to a key, and the least number elsewhere.

    Args:
        length: tokens of a sequence.
        window: latest tokens that a query attends to, its own included.
        first: tokens at the start of the sequence that every query attends to as well.
        dtype: of the mask.
        device: of the mask.

    Returns:
        (1, 1, queries, keys).
    """
    key = torch.arange(length, device=device)
    distance = key[:, None] - key
    allowed = (distance >= 0) & ((distance < window) | (key < first))
    mask = torch.zeros(length, length, dtype=dtype, device=device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]


@contextmanager
def limited_attention(model: Any, paths: Iterable[str], window: int, first: int = 0) -> Iterator[None]:
    """Limit attention modules to a window, and to the first tokens if there are any, until the context ends.

    The mask replaces the one that the model computes. So it is for whole sequences without padding and without a
    cache.

    Args:
        model: a stock model whose attention is eager or scaled dot-product attention.
        paths: of its attention modules.
        window: latest tokens that a query attends to, its own included.
        first: tokens at the start of a sequence that every query attends to as well.
    """
    masks: dict[int, Tensor] = {}

    def limit(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = options["hidden_states"] if "hidden_states" in options else given[0]
        length = inputs.shape[1]
        if length not in masks:
            masks[length] = window_mask(length, window, first, inputs.dtype, inputs.device)
        return given, options | {"attention_mask": masks[length]}

    hooks = [model.get_submodule(path).register_forward_pre_hook(limit, with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def loss_beyond(
    model: Any, blocks: Tensor, window: int, paths: Iterable[str] = (), *, first: int = 0, batch_size: int = 1
) -> TextLoss:
    """Measure the mean nats of the tokens that a window hides a part of the text from.

    Args:
        model: a causal language model, as for `limited_attention`.
        blocks: token ids, (blocks, length), with a length above `window` + 1.
        window: in tokens; predictions from position `window` on count.
        paths: of the attention modules that get the window; none: the model as it is.
        first: tokens at the start of a block that these modules attend to as well.
        batch_size: blocks in one forward pass.
    """
    with limited_attention(model, paths, window, first):
        nats = token_nats(model, blocks, batch_size=batch_size)[:, window:]
    return TextLoss(nats=nats.double().mean().item(), tokens=nats.numel())
