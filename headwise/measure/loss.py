"""Measure nats per token of a language model on blocks of tokens, or on the targets of pairs.

One nat is the natural-logarithm unit of cross-entropy: nats = -ln p(token), and perplexity = exp(mean nats).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.measure.image_prompts import ImagePrompt
from headwise.progress import SILENT, Progress
from headwise.text.marks import given_tokens, tokens_of
from headwise.text.pairs import Pairs


@dataclass(frozen=True)
class TextLoss:
    """Mean cross-entropy of a model on a text.

    Attributes:
        nats: mean of the predicted tokens.
        tokens: number of predicted tokens.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Return exp(nats)."""
        return math.exp(self.nats)


@torch.inference_mode()
def token_nats(model: Any, blocks: Tensor, *, batch_size: int = 8, progress: Progress = SILENT) -> Tensor:
    """Measure -ln p(token | earlier tokens of its block) of every predicted token.

    Args:
        model: a causal language model; the device and the precision of its weights stay as they are.
        blocks: token ids of any integer type, (blocks, length); marks are left out. The first token of a block is
            given, not predicted.
        batch_size: blocks in one forward pass; changes memory and speed, and the result by rounding only.
        progress: counts the blocks, in a stage that the caller has begun.

    Returns:
        Nats, float32 on the CPU, (blocks, length - 1). The mean over rows is the loss of each position, the mean
        over columns the loss of each block.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = []
    for batch in blocks.split(batch_size):
        batch = tokens_of(batch.to(device).long())
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        # Flat: with the vocabulary in the middle, the loss copies the logits once more.
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        rows.append(nats.view(len(batch), -1).float().cpu())
        progress.advance(len(batch))
    model.train(was_training)
    return torch.cat(rows)


@torch.inference_mode()
def pair_nats(model: Any, pairs: Pairs, *, batch_size: int = 8, progress: Progress = SILENT) -> Tensor:
    """Measure -ln p(token | source, earlier tokens of its target) of every predicted token.

    Args:
        model: an encoder-decoder; the device and the precision of its weights stay as they are.
        pairs: sources and targets.
        batch_size: pairs in one forward pass.
        progress: counts the pairs, in a stage that the caller has begun.

    Returns:
        Nats, float32 on the CPU, (pairs, target length - 1); 0 where the target is padding.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    width = pairs.targets.shape[1] - 1
    rows = torch.zeros(len(pairs), width)
    for start in range(0, len(pairs), batch_size):
        place = slice(start, start + batch_size)
        batch = pairs[place].trimmed()
        logits = model(**batch.model_inputs(device), use_cache=False).logits[:, :-1].float()
        expected = batch.targets[:, 1:].to(device)
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
        rows[place, : expected.shape[1]] = nats.float().cpu().where(batch.predicted, 0)
        progress.advance(len(batch))
    model.train(was_training)
    return rows


@torch.inference_mode()
def prompt_nats(model: Any, prompt: ImagePrompt) -> Tensor:
    """Measure -ln p(token | image, earlier tokens) of every token of a prompt's text.

    Tokens of the chat template are given, not predicted.

    Args:
        model: a vision-language model; the device and the precision of its weights stay as they are.
        prompt: with an image.

    Returns:
        Nats, float32 on the CPU, (tokens of text,).
    """
    logits = model(**prompt.model_inputs(model), use_cache=False).logits[0, :-1].float().cpu()
    counted = prompt.text[1:]
    nats: Tensor = torch.nn.functional.cross_entropy(
        logits[counted], prompt.tokens[0, 1:][counted], reduction="none"
    )
    return nats


def num_predicted(text: Tensor | Pairs) -> int:
    """Return the number of tokens that a loss on a text counts.

    Args:
        text: as in `nats_per_token`.
    """
    counted = text.predicted if isinstance(text, Pairs) else ~given_tokens(text[:, 1:])
    return int(counted.sum())


def nats_per_token(
    model: Any, text: Tensor | Pairs, *, batch_size: int = 8, progress: Progress = SILENT
) -> TextLoss:
    """Measure the mean nats per predicted token of blocks, or of the targets of pairs.

    Args:
        model: a causal language model; an encoder-decoder for pairs.
        text: token ids, (blocks, length); a token with the mark GIVEN of `headwise.text.marks` does not count. Or
            pairs of source and target.
        batch_size: blocks or pairs in one forward pass.
        progress: counts the blocks or pairs, in a stage that the caller has begun.

    Returns:
        The mean and the number of predicted tokens.
    """
    if isinstance(text, Pairs):
        nats = pair_nats(model, text, batch_size=batch_size, progress=progress)[text.predicted]
    else:
        nats = token_nats(model, text, batch_size=batch_size, progress=progress)[~given_tokens(text[:, 1:]).cpu()]
    return TextLoss(nats=nats.double().mean().item(), tokens=nats.numel())
