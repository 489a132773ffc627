"""Pairs of source and target text, as token ids with masks: what an encoder-decoder is measured on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError, SettingError
from headwise.text.sources import Data

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

    def __getitem__(self, rows: int | slice | Tensor) -> Pairs:
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(rows)
            rows = slice(rows, rows + 1 or None)
        return Pairs(self.sources[rows], self.source_mask[rows], self.targets[rows], self.target_mask[rows])

    @property
    def predicted(self) -> Tensor:
        """Return which tokens of the targets are predicted: all but the first, and no padding."""
        return self.target_mask[:, 1:]

    def trimmed(self) -> Pairs:
        """Return the pairs without the columns that are padding in all of them."""
        sources, targets = (max(1, int(mask.sum(1).max())) for mask in (self.source_mask, self.target_mask))
        return Pairs(
            self.sources[:, :sources],
            self.source_mask[:, :sources],
            self.targets[:, :targets],
            self.target_mask[:, :targets],
        )

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


@dataclass(frozen=True)
class PairMarks:
    """The tokens that an encoder-decoder has around its targets.

    Attributes:
        padding: fills rows of one batch.
        start: begins every target.
        end: ends a target; empty if the config names none.
    """

    padding: int
    start: int
    end: tuple[int, ...]

    @classmethod
    def of(cls, config: dict[str, Any], decoder: Any) -> PairMarks:
        """Return the tokens that a config names.

        Args:
            config: the config.json.
            decoder: the stock config object of the decoder.

        Raises:
            HeadwiseError: the config names no token that starts a target.
        """
        start = config.get("decoder_start_token_id")
        start = decoder.bos_token_id if start is None else start
        padding, end = decoder.pad_token_id, decoder.eos_token_id
        if start is None:
            raise HeadwiseError(
                "config.json names no token that starts a target.", "Add `decoder_start_token_id` to config.json."
            )
        ends = tuple(end) if isinstance(end, list | tuple) else () if end is None else (end,)
        return cls(0 if padding is None else padding, start, ends[:1])


def encode_pairs(given: Sequence[tuple[str, str]], tokenizer: Any, marks: PairMarks, length: int) -> Pairs:
    """Return pairs of text as token ids; a target starts and ends as the model's own do.

    Args:
        given: sources and targets.
        tokenizer: a stock tokenizer.
        marks: the tokens around a target.
        length: of a source and of a target at most, in tokens; the rest is cut.
    """
    sources = [tokenizer(source)["input_ids"] for source, _ in given]
    targets = [tokenizer(target, add_special_tokens=False)["input_ids"] for _, target in given]
    whole = [[marks.start, *target, *marks.end] for target in targets]
    longest = [min(length, max(map(len, rows))) for rows in (sources, whole)]
    return Pairs(*pad(sources, longest[0], marks.padding), *pad(whole, longest[1], marks.padding))


def require_pairs(path: str | Path, field: str) -> list[tuple[str, str]]:
    """Read the pairs of a file that must hold some.

    Args:
        path: a `.jsonl` file.
        field: the setting that names it.

    Raises:
        SettingError: there is no such file, or it holds no pairs.
        HeadwiseError: a line is no pair.
    """
    if Path(path).suffix == ".jsonl" and not Path(path).is_file():
        raise SettingError(field, f"There is no file {path}.", f"`{field}` names a file of pairs.")
    pairs = read_pairs(path)
    if pairs is None:
        raise SettingError(
            field,
            f"{path} holds no pairs, and an encoder-decoder reads a source and a target.",
            'Give a .jsonl file with the texts "source" and "target" in every line.',
        )
    return pairs


def training_pairs(
    data: Data, tokenizer: Any, marks: PairMarks, count: int, seed: int = 0
) -> tuple[Pairs, Mapping[str, Mapping[str, int]]]:
    """Return the pairs of a recipe's files in random order: one pass over them, or as many as are enough.

    Args:
        data: the text of a recipe; every source is a file of pairs.
        tokenizer: a stock tokenizer.
        marks: the tokens around a target.
        count: number of pairs that are enough.
        seed: of the order.

    Returns:
        The pairs; for each source the pairs and characters in it, and its times per pass.
    """
    facts, rows = {}, []
    for source, times in data.text.items():
        read = require_pairs(source, "text")
        characters = sum(len(text) for pair in read for text in pair)
        facts[source] = {"pairs": len(read), "characters": characters, "times": times}
        rows += read * times
    random.Random(f"train {seed}").shuffle(rows)
    return encode_pairs(rows[:count], tokenizer, marks, data.length), facts


def collate_pairs(rows: Sequence[Pairs], tokenizer: Any, marks: PairMarks) -> dict[str, Tensor]:
    """Return a training batch, padded on the right by the sequence-to-sequence collator of transformers.

    Args:
        rows: of one pair each.
        tokenizer: a stock tokenizer; one without a token for padding gets that of the model.
        marks: the tokens around a target.

    Returns:
        The arguments of a stock encoder-decoder, and `labels`: the targets, -100 in place of padding and of the
        first token, which is given. Losses shift them.
    """
    from transformers import DataCollatorForSeq2Seq

    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(marks.padding)
    features = []
    for row in rows:
        source, target = row.sources[row.source_mask].tolist(), row.targets[row.target_mask].tolist()
        features.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": target})
    batch = DataCollatorForSeq2Seq(tokenizer)(features)
    labels = batch["labels"]
    targets = labels.masked_fill(labels < 0, marks.padding)
    inputs = Pairs(batch["input_ids"], batch["attention_mask"].bool(), targets, labels >= 0).model_inputs()
    labels[:, 0] = -100
    return inputs | {"labels": labels}


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
