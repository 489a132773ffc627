"""Write greedy continuations and assess them: repetition, early ends, and agreement with the parent.

A divergence of next-token distributions is an average over contexts of the corpus. A model can have a small
divergence and still repeat itself on its own output, so the output is assessed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.eval.result import LEVEL, Continuation, GenerationComparison, TextQuality
from headwise.eval.stats import paired_mean

BATCH_SIZE = 8
NGRAM = 4
NUM_SHOWN = 3
# Tokens of a continuation that are compared with the parent's; later ones differ after the first difference.
AGREEMENT_TOKENS = 8
# The output is defective if it is significantly beyond these bounds: more repetition than the parent, more early
# ends than the parent, less agreement with the parent.
MORE_REPETITION, MORE_EARLY_ENDS, LEAST_AGREEMENT = 0.2, 0.1, 0.3
# Bounds without a parent.
MOST_REPETITION, MOST_EARLY_ENDS = 0.9, 0.75
REPEATS = "The output repeats itself: {} of its 4-grams occur earlier in the same text"
ENDS_EARLY = "The output ends early: {} of the continuations have less than half of the requested length"


def select_prompts(tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Select beginnings to continue from held-out modules.

    Args:
        tokenizer: tokenizer of the models.
        count: number of prompts.
        length: tokens in a prompt.
        seed: random seed of the choice.

    Returns:
        Token ids, (count, length).
    """
    from headwise.text.blocks import blocks_from

    # Neighbouring blocks are one piece of text: every fourth block gives more variety.
    return blocks_from("builtin", tokenizer, split="heldout", length=length, count=4 * count, seed=seed)[::4]


def make_greedy(model: Any, new_tokens: int) -> list[int]:
    """Set the generation config of a model to plain greedy decoding.

    Args:
        model: a stock model; its generation config is replaced.
        new_tokens: tokens to write.

    Returns:
        The tokens that end a text.
    """
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = model.config.get_text_config().eos_token_id if ends is None else ends
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    return ends


@torch.inference_mode()
def write_continuations(model: Any, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """Write greedy continuations.

    Args:
        model: a stock model; its generation config is replaced.
        prompts: token ids, (prompts, length).
        new_tokens: tokens to write after each prompt.

    Returns:
        The new tokens after each prompt, up to and including the token that ends the text.
    """
    ends = make_greedy(model, new_tokens)
    continuations = []
    for batch in prompts.to(model.device).split(BATCH_SIZE):
        output = model.generate(batch, attention_mask=torch.ones_like(batch))[:, batch.shape[1] :]
        continuations += [_cut(row, ends) for row in output.tolist()]
    return continuations


def assess_generation(
    prompts: Tensor,
    child: Sequence[list[int]],
    parent: Sequence[list[int]] | None,
    new_tokens: int,
    tokenizer: Any,
) -> GenerationComparison:
    """Assess the continuations of the child and compare them with the parent's.

    Args:
        prompts: token ids, (prompts, length).
        child: continuations of the child.
        parent: continuations of the parent after the same prompts; None without a baseline.
        new_tokens: tokens that were requested after each prompt.
        tokenizer: decodes the samples to read.
    """
    agreement = identical = None
    if parent is None:
        complaints = tuple(_complaints_alone(child, new_tokens))
    else:
        pairs = list(zip(child, parent, strict=True))
        shares = torch.tensor([min(1.0, _common_prefix(a, b) / _compared_length(b)) for a, b in pairs])
        agreement = float(shares.double().mean())
        identical = _mean(a == b for a, b in pairs)
        complaints = tuple(_complaints_compared(child, parent, shares, new_tokens))
    return GenerationComparison(
        prompts=len(child),
        new_tokens=new_tokens,
        child=_quality(child, new_tokens),
        parent=None if parent is None else _quality(parent, new_tokens),
        agreement=agreement,
        agreement_tokens=AGREEMENT_TOKENS,
        identical=identical,
        complaints=complaints,
        samples=tuple(
            Continuation(
                tokenizer.decode(prompts[i]),
                tokenizer.decode(child[i]),
                None if parent is None else tokenizer.decode(parent[i]),
            )
            for i in range(min(NUM_SHOWN, len(child)))
        ),
    )


def repetition(tokens: Sequence[int]) -> float:
    """Compute the share of 4-grams that occur earlier in the same text (seq-rep-4, Welleck et al. 2019).

    Args:
        tokens: the text.
    """
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _complaints_compared(
    child: Sequence[list[int]], parent: Sequence[list[int]], shares: Tensor, new_tokens: int
) -> Iterator[str]:
    rules: tuple[tuple[str, Callable[[list[int]], float], float], ...] = (
        (REPEATS, repetition, MORE_REPETITION),
        (ENDS_EARLY, lambda row: _is_early(row, new_tokens), MORE_EARLY_ENDS),
    )
    for defect, measure, bound in rules:
        ours, theirs = (torch.tensor([float(measure(row)) for row in rows]) for rows in (child, parent))
        if paired_mean(ours, theirs).above(bound) < LEVEL:
            yield f"{defect.format(f'{ours.mean():.0%}')}, {theirs.mean():.0%} in the parent's."
    if (-paired_mean(shares, torch.zeros_like(shares))).above(-LEAST_AGREEMENT) < LEVEL:
        same = AGREEMENT_TOKENS * float(shares.mean())
        yield (f"The output leaves the parent's at once: {same:.1f} of the first {AGREEMENT_TOKENS} tokens agree.")


def _complaints_alone(rows: Sequence[list[int]], new_tokens: int) -> Iterator[str]:
    quality = _quality(rows, new_tokens)
    if quality.repetition > MOST_REPETITION:
        yield f"{REPEATS.format(f'{quality.repetition:.0%}')}."
    if quality.early_end > MOST_EARLY_ENDS:
        yield f"{ENDS_EARLY.format(f'{quality.early_end:.0%}')}."


def _quality(rows: Sequence[list[int]], new_tokens: int) -> TextQuality:
    return TextQuality(_mean(map(repetition, rows)), _mean(_is_early(row, new_tokens) for row in rows))


def _is_early(row: Sequence[int], new_tokens: int) -> bool:
    return len(row) < new_tokens / 2


def _compared_length(row: Sequence[int]) -> int:
    return max(1, min(AGREEMENT_TOKENS, len(row)))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens before the first difference."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _cut(row: list[int], ends: Sequence[int]) -> list[int]:
    place = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: place + 1]


def _mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
