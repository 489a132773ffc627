"""Pairs of source and target text, as token ids with masks: what an encoder-decoder is measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError

FIELDS = ("source", "target")


@dataclass(frozen=True)
class Pairs:
    """Sources and targets, padded on the right.

    Attributes:
        sources: int64 (pairs, source length), what the encoder reads.
        source_mask: bool, true where `sources` is no padding.
        targets: int64 (pairs, target length), what the decoder reads; the first token starts every target.
        target_mask: bool, true where `targets` is no padding.
    """

    sources: Tensor
    source_mask: Tensor
    targets: Tensor
    target_mask: Tensor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice) -> Pairs:
        return Pairs(self.sources[rows], self.source_mask[rows], self.targets[rows], self.target_mask[rows])

    def model_inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the arguments of a stock encoder-decoder.

        Args:
            device: of the tensors.
        """
        return {
            "input_ids": self.sources.to(device),
            "attention_mask": self.source_mask.long().to(device),
            "decoder_input_ids": self.targets.to(device),
            "decoder_attention_mask": self.target_mask.long().to(device),
        }


def pad(rows: Sequence[Sequence[int]], length: int, padding: int) -> tuple[Tensor, Tensor]:
    """Return token rows of one length, cut or padded on the right, and the mask of what is no padding.

    Args:
        rows: token ids.
        length: of every row afterwards.
        padding: the token id that fills the rest.
    """
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        kept = torch.tensor(list(row[:length]), dtype=torch.long)
        ids[i, : len(kept)], mask[i, : len(kept)] = kept, True
    return ids, mask


def read_pairs(path: str | Path) -> list[tuple[str, str]] | None:
    """Read the pairs of a JSON-lines file; None: the file holds text of another form.

    Args:
        path: a `.jsonl` file with the keys "source" and "target" in every line.

    Raises:
        HeadwiseError: some lines have these keys, and one has not.
    """
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    pairs: list[tuple[str, str]] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadwiseError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    # Not `splitlines`: JSON strings may hold other separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError:
            row = None
        source, target = (row.get(key) if isinstance(row, dict) else None for key in FIELDS)
        if not (isinstance(source, str) and isinstance(target, str) and source and target):
            if not pairs:
                return None
            raise HeadwiseError(
                f'{path}, line {number}, is no pair: each line needs the texts "source" and "target".'
            )
        pairs.append((source, target))
    return pairs or None
