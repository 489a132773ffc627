"""Choose and read the calibration pairs of an encoder-decoder: given pairs, or the model's own outputs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from headwise.convert.calibration.corpus import MIXTURE, SAMPLED, keep_tokens, kept_tokens, require_known_tokens
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint
from headwise.io.tokenizer import load_tokenizer, tokenizer_errors
from headwise.models.architecture import Architecture
from headwise.models.stock import load_model
from headwise.progress import SILENT, Progress
from headwise.text.blocks import blocks_from
from headwise.text.pairs import PairMarks, Pairs, encode_pairs, pad, read_pairs

# Longest source and target in tokens, and the pairs whose outputs are sampled at once.
PAIR_LENGTH, BATCH = 256, 32


def read_pair_corpus(
    checkpoint: Checkpoint,
    arch: Architecture,
    calibration: Any,
    device: torch.device,
    progress: Progress = SILENT,
    cache: Path | None = None,
) -> Pairs:
    """Return the calibration pairs as token ids.

    Args:
        checkpoint: the source.
        arch: its architecture.
        calibration: has text, sequences, length and seed. A `.jsonl` file of pairs gives both sides. Of any other
            text, blocks are the sources, and the targets are sampled from the model.
        device: where the targets are sampled.
        progress: receives a note.
        cache: folder that keeps the tokens; a run that was interrupted reads them again.

    Raises:
        HeadwiseError: the tokenizer is missing or fails, or gives a token outside the vocabulary.
    """
    kept = kept_tokens(cache, calibration, [field.name for field in fields(Pairs)])
    if kept is not None:
        return Pairs(**{name: kept[name].bool() if name.endswith("mask") else kept[name].long() for name in kept})
    pairs = _read(checkpoint, arch, calibration, device, progress)
    if cache is not None:
        keep_tokens(cache, calibration, {name: tensor.to(torch.int32) for name, tensor in vars(pairs).items()})
    return pairs


def _read(
    checkpoint: Checkpoint, arch: Architecture, calibration: Any, device: torch.device, progress: Progress
) -> Pairs:
    hint = "Add the tokenizer's files to the folder, or pass `calibrate` none."
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.source, hint)
    text = MIXTURE if calibration.text == SAMPLED else calibration.text
    given = read_pairs(text)
    with tokenizer_errors(f"The tokenizer of {checkpoint.source} fails on the calibration text", hint):
        if given is not None:
            if len(given) < 2:
                raise HeadwiseError(f"{text} holds {len(given)} pair, and two are needed.", "Give more pairs.")
            progress.note(f"{min(len(given), calibration.sequences):,} pairs of {len(given):,} are read.")
            marks = PairMarks.of(checkpoint.config, arch.stock_config(checkpoint.config))
            pairs = encode_pairs(given[: calibration.sequences], tokenizer, marks, calibration.length)
        else:
            blocks = blocks_from(
                text,
                tokenizer,
                split="calibration",
                length=calibration.length,
                count=calibration.sequences,
                seed=calibration.seed,
            )
            pairs = sample_pairs(checkpoint, arch, blocks, calibration, device, progress)
    require_known_tokens(checkpoint, arch.stock_config(checkpoint.config).vocab_size, pairs.sources, pairs.targets)
    return pairs


@torch.no_grad()
def sample_pairs(
    checkpoint: Checkpoint,
    arch: Architecture,
    sources: torch.Tensor,
    calibration: Any,
    device: torch.device,
    progress: Progress = SILENT,
) -> Pairs:
    """Return sources with the outputs that the model samples for them, whole in memory.

    Args:
        checkpoint: the model.
        arch: its architecture.
        sources: int64 (pairs, length).
        calibration: has length, the most tokens of a target, and seed.
        device: where the model runs.
        progress: receives a note.
    """
    import transformers

    marks = PairMarks.of(checkpoint.config, arch.stock_config(checkpoint.config))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(checkpoint, arch.auto_class, dtype, device).eval()
    ends = arch.stock_config(checkpoint.config).eos_token_id
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=marks.start, pad_token_id=marks.padding, eos_token_id=ends
    )
    torch.manual_seed(calibration.seed)
    progress.note(f"Sampling the targets of {len(sources):,} sources from the model.")
    rows: list[list[int]] = []
    for batch in sources.split(BATCH):
        out = model.generate(
            batch.to(device),
            attention_mask=torch.ones_like(batch).to(device),
            do_sample=True,
            top_k=0,
            max_new_tokens=calibration.length - 1,
        )
        for row in out.tolist():
            length = len(row)
            while length > 1 and row[length - 1] == marks.padding:
                length -= 1
            rows.append(row[:length])
    targets = pad(rows, max(map(len, rows)), marks.padding)
    return Pairs(sources, torch.ones_like(sources, dtype=torch.bool), *targets)
