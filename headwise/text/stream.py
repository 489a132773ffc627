"""Stream training text that is too long to be read before training, in an order that a seed decides.

Documents are read in windows of some millions of characters and shuffled within them. A window's rows depend only
on its position in the source, the seed and its number. So a resumed run continues at the same row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from headwise.errors import HeadwiseError
from headwise.text import packing, sources
from headwise.text.chat import Chat

WINDOW_CHARACTERS = 1 << 24


class Stream(IterableDataset[Tensor]):
    """Endless rows of tokens as `headwise.text.packing.pack` makes them; ended sources are read again.

    Args:
        text: source to weight; a source of weight 2 is drawn from twice as often as one of weight 1.
        tokenizer: a stock tokenizer.
        length: tokens in a row.
        seed: of the order.
        characters: least number in a window.
    """

    def __init__(
        self,
        text: Mapping[str, float],
        tokenizer: Any,
        length: int,
        seed: int = 0,
        characters: int = WINDOW_CHARACTERS,
    ) -> None:
        self.text, self.tokenizer, self.length, self.seed = text, tokenizer, length, seed
        self.characters = characters
        self._begun: list[tuple[int, dict[str, Any]]] = []  # windows by the number of their first row
        self._start: dict[str, Any] = {"rows": 0, "skip": 0, "window": 0, "passes": 0, "source": None}

    def __iter__(self) -> Iterator[Tensor]:
        row = self._start["rows"] - self._start["skip"]
        skip = self._start["skip"]
        self._begun = []
        # Read and tokenised one window ahead, beside the training.
        with ThreadPoolExecutor(1) as ahead:
            windows = self._windows()
            following = ahead.submit(next, windows)
            while True:
                start, rows = following.result()
                following = ahead.submit(next, windows)
                self._begun.append((row, start))
                yield from rows[skip:]
                row, skip = row + len(rows), 0

    def state_dict(self, rows: int) -> dict[str, Any]:
        """Return the position of the stream after a number of rows, as plain data.

        A loader reads ahead, so the caller counts. Windows before that position are forgotten.

        Args:
            rows: number of rows that were trained on.
        """
        while len(self._begun) > 1 and self._begun[1][0] <= rows:
            del self._begun[0]
        if not self._begun:
            return dict(self._start)
        first, start = self._begun[0]
        return {**start, "rows": rows, "skip": rows - first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position at the next iteration.

        Args:
            state: as `state_dict` returns it.
        """
        self._start = dict(state)

    def _windows(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield the position and the rows of each window."""
        begin, window = packing.beginning_of_text(self.tokenizer), self._start["window"]
        for passes in count(self._start["passes"]):
            source = self._open(passes)
            if passes == self._start["passes"] and self._start["source"] is not None:
                source.load_state_dict(self._start["source"])
            num_rows, position = 0, source.state_dict()
            for texts in self._documents(source):
                random.Random(f"{self.seed} {window}").shuffle(texts)
                rows = packing.pack(packing.encode(texts, self.tokenizer), self.length, begin)
                if len(rows):
                    yield {"window": window, "passes": passes, "source": position}, rows
                position = source.state_dict()
                window, num_rows = window + 1, num_rows + len(rows)
            if not num_rows:
                raise HeadwiseError(
                    f"The recipe's text ({', '.join(self.text)}) does not fill one row of {self.length} tokens."
                )

    def _open(self, passes: int) -> Any:
        opened = [sources.open_stream(source) for source in self.text]
        if len(opened) == 1:
            return opened[0]
        from datasets import interleave_datasets

        total = sum(self.text.values())
        shares = [weight / total for weight in self.text.values()]
        return interleave_datasets(opened, shares, seed=self.seed + passes, stopping_strategy="all_exhausted")

    def _documents(self, source: Any) -> Iterator[list[str | Chat]]:
        texts: list[str | Chat] = []
        size = 0
        for text in sources.stream_documents(", ".join(self.text), source):
            texts.append(text)
            size += len(text)
            if size >= self.characters:
                yield texts
                texts, size = [], 0
        if texts:
            yield texts
