"""Measure in memory what it costs a sparse model that layers share an indexer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from headwise.measure.loss import TextLoss, token_nats


@contextmanager
def shared_indexers(model: Any, paths: Sequence[str], own: Collection[int]) -> Iterator[None]:
    """Let layers attend to the keys that the last indexer before them selects, until the context ends.

    Args:
        model: a stock model with an indexer in every layer.
        paths: of the attention modules, in the order of the layers.
        own: indices of the layers that keep their indexer; the first layer is among them.
    """
    selected: list[Tensor] = []
    hooks, replaced = [], []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        selected[:] = [output]

    for layer, path in enumerate(paths):
        indexer = model.get_submodule(f"{path}.indexer")
        if layer in own:
            hooks.append(indexer.register_forward_hook(keep))
        else:
            indexer.forward = lambda *_, **__: selected[0]
            replaced.append(indexer)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for indexer in replaced:
            del indexer.forward


def loss_with_shared(
    model: Any, blocks: Tensor, budget: int, paths: Sequence[str], own: Collection[int], *, batch_size: int = 1
) -> TextLoss:
    """Measure the mean nats of the tokens whose queries select a part of the text.

    Args:
        model: as for `shared_indexers`.
        blocks: token ids, (blocks, length), with a length above `budget` + 1.
        budget: keys that a query attends to; predictions from that position on count.
        paths: of the attention modules, in the order of the layers.
        own: indices of the layers that keep their indexer.
        batch_size: blocks in one forward pass.
    """
    with shared_indexers(model, paths, own):
        nats = token_nats(model, blocks, batch_size=batch_size)[:, budget:]
    return TextLoss(nats=nats.double().mean().item(), tokens=nats.numel())
